"""A wheel, built from a copy of the tree and installed without a clone, does what a clone does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import shards
from pretrain.commands.dispatch import COMMANDS
from pretrain.topology import free_port

ROOT = Path(__file__).parents[2]
NEEDED = ("pyproject.toml", "README.md", "LICENSE", "configs", "launch", "pretrain", "shards", "slurm")  # for a build
MADE_BY_RUNS = ("__pycache__", "*.index.json", "*.windows", "*.manifest")
VERSION = shards.__version__
Shell = Callable[[str], subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from a copy of the tree, since a build leaves files behind in its tree."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    tree.mkdir()
    for name in NEEDED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, symlinks=True, ignore=shutil.ignore_patterns(*MADE_BY_RUNS))
        else:
            shutil.copy(source, tree)
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(folder), str(tree)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def shell(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Return a function that runs a shell command in its own folder, with the wheel and its dependencies installed."""
    folder = tmp_path_factory.mktemp("installed")
    environment, where = folder / "venv", folder / "home"
    where.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    # The dependencies are this environment's, since a second copy of torch would take minutes and gigabytes. A folder
    # named by a .pth file is searched last, and .pth files in it, such as an editable install's, do not count.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(environment / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--quiet", "--ignore-installed"]
    subprocess.run([*pip, "--no-index", str(wheel)], check=True)
    path = os.pathsep.join([str(environment / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    variables.pop("PYTHONPATH", None)

    def run(command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", "-c", command], cwd=where, env=variables, text=True, capture_output=True)

    assert run("headrace sample .").returncode == 0
    return run


def test_the_wheel_contains_every_file_that_the_commands_read(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = [path for path in (ROOT / "shards").rglob("*") if path.suffix == ".py" or "sample" in path.parts]
    tracked += (ROOT / "pretrain").rglob("*.py")
    wanted = {str(path.relative_to(ROOT)) for path in tracked if path.is_file()}
    wanted = {name for name in wanted if not name.endswith((".index.json", ".windows", ".manifest"))}
    wanted |= {f"pretrain/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    wanted |= {f"pretrain/cluster/templates/{path.name}" for path in (ROOT / "slurm").glob("*.sbatch")}
    wanted |= {"shards/py.typed", "pretrain/py.typed"}
    assert wanted <= names
    others = {name for name in names - wanted if not name.startswith(f"headrace-{VERSION}.dist-info/")}
    assert others == set()


def test_the_version_is_that_of_the_project(shell: Shell) -> None:
    assert shell("headrace --version").stdout == f"headrace {VERSION}\n"
    code = "import pretrain, shards; print(pretrain.__version__, shards.__version__, shards.__file__)"
    pretrain_version, shards_version, place = shell(f"python -c '{code}'").stdout.split()
    assert pretrain_version == shards_version == VERSION
    assert "installed" in place, "the wheel was tested, not this tree"


def test_every_command_is_listed_and_shows_help_under_its_own_name(shell: Shell) -> None:
    listed = shell("headrace --help").stdout
    assert [name for name in COMMANDS if not re.search(rf"^    {name}\s", listed, re.MULTILINE)] == []
    said = shell("headrace index --help")  # it imports no torch
    assert said.stdout.startswith("usage: headrace index ")
    assert "launch/" not in said.stdout
    assert shell("headrace no-such-command").returncode == 2


def test_a_command_that_a_message_names_can_be_typed(shell: Shell) -> None:
    refused = shell("headrace train --config configs/quickstart.yaml data.max_index_at_start=1")
    assert refused.returncode == 2, refused.stderr
    (command,) = re.findall(r"headrace index .*", refused.stderr)
    indexed = shell(command)
    assert indexed.returncode == 0, indexed.stderr
    assert re.search(r"\d+ shards indexed", indexed.stdout)


def test_the_sample_trains_under_a_launcher(shell: Shell) -> None:
    # What the `deepspeed` command does; the one on the path would start this environment's Python.
    launcher = f"python -m deepspeed.launcher.runner --master_port {free_port()} --module pretrain"
    brief = "run.name=brief train.steps=2 model.n_layers=1 data.num_workers=0"
    brief += " evaluation.max_documents=1 wandb.mode=disabled"
    trained = shell(f"{launcher} train --config configs/quickstart.yaml {brief}")
    assert trained.returncode == 0, trained.stderr
    assert "Run folder  runs/brief" in trained.stdout


def test_a_job_script_starts_the_installed_commands(shell: Shell) -> None:
    job = "headrace submit --config configs/quickstart.yaml --nodes 1 --gpus-per-node 0 --time 60 --dry-run"
    shown = shell(job)
    assert shown.returncode == 0, shown.stderr
    (train,) = re.findall(r"^train=\((.*?)\)", shown.stdout, re.MULTILINE)
    program, command = train.rsplit(" ", 1)
    assert command == "train"
    assert shell(f"{program} --version").stdout == f"headrace {VERSION}\n"
