"""Count the files that a reader opens to follow something from one end of the program to the other.

    python benchmarks/reading.py                  # this tree
    python benchmarks/reading.py --root FOLDER    # another checkout, such as one from before a change

Three things are followed in a small run of one CPU rank, whose loader works in the training process:

    batch       from the bytes of a shard to the loss: `Loader.next_batch` and `Engine.train_step`
    checkpoint  from a save to a resume under another ZeRO stage: every function of the checkpoint room, in both starts
    value       a value of the config, from the YAML file to its use: `load_config`

A file counts if one of its functions runs while a followed function is at work, or calls such a function. For the
value, the files that name its key count as well. Files that are only imported, and packages' docstrings, do not.
The tree is run unchanged, with a profiler in each of its threads, so the definition is the same for every checkout.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType

PACKAGES = ("shards", "pretrain", "launch")
KEY = "max_failed_saves"  # key of the followed value, in the section `checkpoint`
RUN = [
    "run.name=reading", "model.dim=64", "model.ffn_dim=128", "train.global_batch_size=8", "data.num_workers=0",
    "data.prefetch_bytes=0", "evaluation.suite=null", "wandb.mode=disabled", "checkpoint.every=2",
    f"checkpoint.{KEY}=2",
]  # fmt: skip
STARTS = (["train.steps=2"], ["train.steps=3", "parallel.zero_stage=3"])  # a save, and a resume in another layout

FOLLOWED: dict[str, Callable[[str, str], bool]] = {
    "batch": lambda file, function: function in ("Loader.__next__", "Loader.next_batch", "Engine.train_step"),
    "checkpoint": lambda file, function: file.startswith("pretrain/checkpoint/"),
    "value": lambda file, function: function == "load_config",
}
# Where a followed function is not followed further: a resumed loader opens windows, which is the batch's way
LEFT: dict[str, Callable[[str], bool]] = {"checkpoint": lambda function: function.startswith("Loader.")}


class Profiler:
    """A profiler that records, for everything followed, the files that run under it and those that call it."""

    def __init__(self, root: Path) -> None:
        self.files: dict[str, set[str]] = {name: set() for name in FOLLOWED}
        self._root = f"{root.resolve()}/"
        self._names: dict[object, str | None] = {}  # by code object: the file, if it is one of the project's
        self._threads = threading.local()

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if event not in ("call", "return"):
            return
        code = frame.f_code
        file = self._names.get(code, "")
        if file == "":
            file = self._names[code] = self._project_file(code)
        if file is None:
            return
        stack: list[tuple[str, set[str]]] = self._threads.__dict__.setdefault("stack", [])
        if event == "return":
            if stack:  # a thread may be inside a function when profiling begins
                stack.pop()
            return
        caller, above = stack[-1] if stack else ("", set())
        above = {name for name in above if not LEFT.get(name, lambda function: False)(code.co_qualname)}
        begun = {name for name, is_followed in FOLLOWED.items() if is_followed(file, code.co_qualname)}
        for name in above | begun:
            self.files[name].add(file)
        for name in begun - above:
            self.files[name] |= {caller} - {""}
        stack.append((file, above | begun))

    def _project_file(self, code: CodeType) -> str | None:
        name = code.co_filename.removeprefix(self._root)
        is_function = code.co_flags & inspect.CO_OPTIMIZED  # not the body of a module or class, run by an import
        return name if is_function and name.startswith(PACKAGES) else None


def profile(output: Path, words: list[str]) -> None:
    """Run launch/pretrain.py of the current folder, and record the files of everything that is followed."""
    profiler = Profiler(Path.cwd())
    script = Path("launch/pretrain.py").resolve()
    sys.argv = [str(script), *words]
    sys.path[0] = str(script.parent)
    threading.setprofile(profiler)
    sys.setprofile(profiler)
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.setprofile(None)
        output.write_text(json.dumps({name: sorted(files) for name, files in profiler.files.items()}))


def files_naming(root: Path, key: str) -> set[str]:
    """Find the files that name a key: as a field, an attribute, an argument, or in a string of its own."""
    found = set()
    for package in PACKAGES:
        for path in (root / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [getattr(node, name, None) for name in ("id", "attr", "arg", "value")]
                if key in [name for name in names if isinstance(name, str)]:
                    found.add(str(path.relative_to(root)))
    return found


def files_of(root: Path) -> dict[str, set[str]]:
    """Run a checkout's two starts, and return the files by what is followed."""
    found: dict[str, set[str]] = {name: set() for name in FOLLOWED}
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        for start in STARTS:
            output = Path(folder, "files.json")
            places = [f"run.dir={folder}/runs", f"data.index_dir={folder}/index"]
            words = ["--config", "configs/quickstart.yaml", *RUN, *places, *start]
            command = [sys.executable, str(Path(__file__).resolve()), "--profile", str(output), "--", *words]
            ran = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
            if ran.returncode:
                raise SystemExit(f"{root}: {' '.join(start)} failed\n{ran.stdout}{ran.stderr}")
            for name, files in json.loads(output.read_text()).items():
                found[name] |= set(files)
    found["value"] |= files_naming(root, KEY)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="the checkout to run")
    parser.add_argument("--profile", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.profile:
        profile(arguments.profile, arguments.words)
        return
    for name, files in files_of(arguments.root.resolve()).items():
        print(f"{name}: {len(files)} files")
        for file in sorted(files):
            print(f"    {file}")


if __name__ == "__main__":
    main()
