"""Compare a whole training step with Hugging Face's and plain PyTorch's, on CPUs: `python benchmarks/step.py`.

    python benchmarks/step.py --root ../headrace-before --json step.json
    python benchmarks/step.py --shapes quickstart --profile

A step is forward and backward pass, gradient clipping and the update of AdamW. Contenders, each eager and compiled:
Headrace's Engine (DeepSpeed's ZeRO on one rank); `LlamaForCausalLM` of transformers with SDPA; a LLaMA in plain
PyTorch, the floor. In bf16 all have bf16 weights with fp32 masters and the fused AdamW. `--root` adds the Engine of
another checkout. All start from the same weights, and nothing is shown unless the losses of their first steps agree.

Each contender is a process of its own. They are started one after another, make steps until nothing is compiled any
more, and then take turns, since other work on a machine comes and goes; each figure is a median over all turns. Shapes:
a LLaMA of 44 million parameters in bf16, and the quickstart's as its config has it; each with one document a row, and
with documents of 200 tokens, which are cut where a row ends.

On a machine that does other work, `--clock cpu --threads 1` counts the CPU time of each process instead of the clock's.
Memory is the tensors that live on between steps (weights, masters, moments) and the growth of the resident set in a
step. The share of the peak is that of products of 2,048 x 2,048 matrices in the same precision, which take turns too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml

ROOT = Path(__file__).resolve().parents[1]
NAMES = {"headrace": "Headrace", "before": "Headrace, before", "hugging_face": "Hugging Face", "plain": "plain PyTorch"}
LOSS_TOLERANCE = 0.01  # relative; bf16 rounds in another order in each contender
DOCUMENTS = {"long": None, "short": 200}  # tokens in each; None: as many as a row has
PROFILED_STEPS = 3


@dataclass(frozen=True)
class Task:
    """What a contender trains.

    Attributes:
        model: values of a LlamaConfig.
        precision: "bf16" or "fp32", the type of the weights in the forward and backward pass.
        rows, seq_len: the batch.
        document_tokens: length of all documents, which are cut where a row ends; None: every row is one document.
        parallel: values of Headrace's ParallelConfig.
    """

    model: dict[str, Any]
    precision: str
    rows: int
    seq_len: int
    document_tokens: int | None
    parallel: dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a process is started with.

    Attributes:
        contender: a key of CONTENDERS.
        compiled: whether torch.compile is used.
        root: the checkout whose packages are measured.
    """

    contender: str
    compiled: bool
    task: Task
    root: str

    @classmethod
    def from_json(cls, text: str) -> Settings:
        values = json.loads(text)
        return cls(**{**values, "task": Task(**values["task"])})


def task_44m(root: Path, document_tokens: int | None) -> Task:
    """Describe a LLaMA of 44 million parameters, its embeddings tied."""
    model = {"dim": 512, "n_layers": 8, "n_heads": 8, "vocab_size": 32_000, "tie_embeddings": True}
    return Task(model, "bf16", rows=8, seq_len=512, document_tokens=document_tokens, parallel={})


def task_quickstart(root: Path, document_tokens: int | None) -> Task:
    """Describe what a checkout's quickstart trains, in the precision and layout of its own config."""
    config = yaml.safe_load((root / "configs/quickstart.yaml").read_text())
    rows, seq_len = config["train"]["global_batch_size"], config["data"]["seq_len"]
    return Task(config["model"], config["precision"], rows, seq_len, document_tokens, config["parallel"])


def task_tiny(root: Path, document_tokens: int | None) -> Task:
    """Describe a model whose figures mean nothing, to try this program."""
    model = {"dim": 64, "n_layers": 1, "n_heads": 4, "vocab_size": 512}
    return Task(model, "fp32", rows=2, seq_len=256, document_tokens=document_tokens, parallel={})


SHAPES = {"44m": task_44m, "quickstart": task_quickstart, "tiny": task_tiny}


@dataclass
class Contender:
    """A process that makes steps when told to.

    Attributes:
        name: as the table calls it.
        ready: what it said when it was ready; see `step_contenders.prepare`.
        seconds, cpu_seconds: of each step so far.
    """

    name: str
    settings: Settings
    process: subprocess.Popen[str]
    errors: Any
    ready: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    profile: dict[str, float] | None = None

    @classmethod
    def start(cls, name: str, settings: Settings, threads: int) -> Self:
        """Start it and wait until it is ready."""
        errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # `stop` closes it
        command = [sys.executable, str(Path(__file__).with_name("step_contenders.py"))]
        process = subprocess.Popen(
            [*command, json.dumps(dataclasses.asdict(settings))],
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": settings.root},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
        contender = cls(name, settings, process, errors)
        contender.ready = contender._answer()
        return contender

    def make_steps(self, steps: int) -> None:
        """Make steps and keep their times."""
        answer = self._ask({"steps": steps})
        if answer["compiled_graphs"]:
            raise SystemExit(f"{self.name} compiled {answer['compiled_graphs']} graphs during a timed step")
        self.seconds += answer["seconds"]
        self.cpu_seconds += answer["cpu_seconds"]

    def median_seconds(self, clock: str) -> float:
        return statistics.median(self.cpu_seconds if clock == "cpu" else self.seconds)

    def make_profile(self) -> None:
        self.profile = self._ask({"profile": PROFILED_STEPS})

    def _ask(self, order: dict[str, int]) -> dict[str, Any]:
        assert self.process.stdin
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise SystemExit(f"{self.name} ended with exit code {self.process.wait()}:\n{self.errors.read()[-4000:]}")
        return json.loads(line)

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()


@dataclass(frozen=True)
class Figures:
    """What a table shows of a contender; memory in bytes, None where it cannot be measured."""

    tokens_per_second: float
    step_seconds: float
    cpu_seconds: float
    share_of_peak: float
    kept_bytes: int
    step_bytes: int | None
    start_seconds: float

    @property
    def peak_bytes(self) -> int | None:
        return None if self.step_bytes is None else self.kept_bytes + self.step_bytes


def entrants(shape: str, document_tokens: int | None, options: argparse.Namespace) -> list[tuple[str, Settings]]:
    """List the contenders of a table by name, in the order of their turns."""
    found = []
    for key in options.contenders:
        root = options.root if key == "before" else ROOT
        if root is None:
            continue
        task = SHAPES[shape](root, document_tokens)
        contender = "headrace" if key == "before" else key
        for compiled in (False, True):
            if not (compiled and options.no_compile):
                name = NAMES[key] + (", compiled" if compiled else "")
                found.append((name, Settings(contender, compiled, task, str(root))))
    return found


def measure(shape: str, document_tokens: int | None, options: argparse.Namespace) -> dict[str, Any]:
    """Let all contenders of a table take turns; return the table's figures as JSON."""
    peak_settings = Settings("matrix_product", False, SHAPES[shape](ROOT, document_tokens), str(ROOT))
    contenders: list[Contender] = []
    try:
        for name, settings in [("peak", peak_settings), *entrants(shape, document_tokens, options)]:
            contenders.append(Contender.start(name, settings, options.threads))
            print(f"{name} is ready", file=sys.stderr, flush=True)
        check_losses(contenders[1:])
        for _ in range(options.rounds):
            for contender in contenders:
                contender.make_steps(options.steps)
        if options.profile:
            for contender in contenders[1:]:
                contender.make_profile()
    finally:
        for contender in contenders:
            contender.stop()
    return summary(shape, document_tokens, options.clock, contenders[0], contenders[1:])


def check_losses(contenders: list[Contender]) -> None:
    """Raise SystemExit unless all contenders had the same losses, and so compute the same steps."""
    for contender in contenders[1:]:
        for found, wanted in zip(contender.ready["losses"], contenders[0].ready["losses"], strict=True):
            if not abs(found - wanted) <= LOSS_TOLERANCE * wanted:
                raise SystemExit(
                    f"{contender.name} does not train as {contenders[0].name} does: losses of the first steps"
                    f" {contender.ready['losses']} and {contenders[0].ready['losses']}"
                )


def summary(
    shape: str, document_tokens: int | None, clock: str, peak: Contender, contenders: list[Contender]
) -> dict[str, Any]:
    """Return the figures of a table, and all that they were made of."""
    peak_flops = peak.ready["peak_flops_of_step"] / peak.median_seconds(clock)
    rows = {}
    for contender in contenders:
        ready = contender.ready
        speed = ready["tokens"] / contender.median_seconds(clock)
        figures = Figures(
            tokens_per_second=speed,
            step_seconds=statistics.median(contender.seconds),
            cpu_seconds=statistics.median(contender.cpu_seconds),
            share_of_peak=speed * ready["flops_per_token"] / peak_flops,
            kept_bytes=ready["kept_bytes"],
            step_bytes=ready["step_bytes"],
            start_seconds=ready["start_seconds"],
        )
        rows[contender.name] = {
            **dataclasses.asdict(figures),
            "peak_bytes": figures.peak_bytes,
            "losses": ready["losses"],
            "all_seconds": contender.seconds,
            "all_cpu_seconds": contender.cpu_seconds,
            "profile_ms": contender.profile,
            "settings": dataclasses.asdict(contender.settings.task),
        }
    ready = contenders[0].ready
    return {
        "shape": shape,
        "document_tokens": document_tokens,
        "parameters": ready["parameters"],
        "tokens": ready["tokens"],
        "clock": clock,
        "peak_flops": peak_flops,
        "contenders": rows,
    }


def show(table: dict[str, Any]) -> None:
    """Print a table of what was measured, in Markdown."""
    documents = "one document a row" if table["document_tokens"] is None else f"documents of {table['document_tokens']}"
    print(f"\n{table['shape']}: {table['parameters'] / 1e6:.1f}M parameters, {table['tokens']} tokens a step,"
          f" {documents}; products {table['peak_flops'] / 1e9:.0f} GFLOP/s\n")  # fmt: skip
    print(f"| by {table['clock']} time | tokens/s | step, s | CPU s | share of peak | memory, MB | kept + in a step |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for name, row in table["contenders"].items():
        step_bytes = row["step_bytes"]
        total, parts = ("", "not measured") if step_bytes is None else (
            f"{row['peak_bytes'] / 1e6:.0f}", f"{row['kept_bytes'] / 1e6:.0f} + {step_bytes / 1e6:.0f}"
        )  # fmt: skip
        print(f"| {name} | {row['tokens_per_second']:,.0f} | {row['step_seconds']:.3f} | {row['cpu_seconds']:.3f} |"
              f" {row['share_of_peak']:.0%} | {total} | {parts} |")  # fmt: skip
    profiles = {name: row["profile_ms"] for name, row in table["contenders"].items() if row["profile_ms"]}
    if profiles:
        kinds = list(dict.fromkeys(kind for profile in profiles.values() for kind in profile))
        print(f"\n| profiled, ms a step | {' | '.join(kinds)} |\n| --- |{' ---: |' * len(kinds)}")
        for name, profile in profiles.items():
            print(f"| {name} | {' | '.join(f'{profile.get(kind, 0):,.0f}' for kind in kinds)} |")


def goals(table: dict[str, Any]) -> None:
    """Print how the best of Headrace stands to the goals, where a table has what they are measured against."""
    rows = table["contenders"]
    ours = [rows[name] for name in ("Headrace", "Headrace, compiled") if name in rows]
    theirs = rows.get("Hugging Face, compiled")
    befores = [rows[name] for name in ("Headrace, before", "Headrace, before, compiled") if name in rows]
    if ours and theirs:
        speed = max(row["tokens_per_second"] for row in ours) / theirs["tokens_per_second"]
        print(f"\nHeadrace is {speed:.2f} times as fast as Hugging Face compiled", end="")
        sizes = [row["peak_bytes"] for row in ours if row["peak_bytes"]]
        print(f", in {min(sizes) / theirs['peak_bytes']:.2f} of its memory" if sizes and theirs["peak_bytes"] else "")
    if ours and befores:
        print(f"eager: {ours[0]['tokens_per_second'] / befores[0]['tokens_per_second']:.2f} times as fast as before")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["44m", "quickstart"])
    parser.add_argument("--documents", nargs="+", choices=list(DOCUMENTS), default=list(DOCUMENTS))
    parser.add_argument("--contenders", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--root", type=Path, help="another checkout, measured as `before`")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=3, help="steps in a turn")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="of what tokens/s and shares are made")
    parser.add_argument("--no-compile", action="store_true", help="leave out what takes a minute to start")
    parser.add_argument("--profile", action="store_true", help="show where a step's time goes")
    parser.add_argument("--quick", action="store_true", help="try the program on a tiny model in one round")
    parser.add_argument("--json", type=Path, help="a file for all figures")
    options = parser.parse_args()
    if options.quick:
        options.shapes, options.rounds, options.steps, options.no_compile = ["tiny"], 1, 1, True
    tables = []
    for shape in options.shapes:
        for documents in options.documents:
            tables.append(measure(shape, DOCUMENTS[documents], options))
            show(tables[-1])
            goals(tables[-1])
            if options.json:
                options.json.write_text(json.dumps(tables, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
