"""Tell a large run from small ones: `headrace scale runs/a runs/b ... --config configs/large.yaml`.

The small runs, such as those of a sweep over width and learning rate, must have finished. Shown are the best of each
size, a fit of the loss over compute, one of the best learning rate over the width, what both say of the config's model,
with intervals, and how long it takes at the speed that the runs had. Nothing is extrapolated from fewer than three
sizes. See docs/sweeps.md.

Exit codes: 0 told, 2 no such run, too few sizes, or runs that cannot be compared, 1 anything else.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from pretrain.config import RunConfig, load_config
from pretrain.model.size import flops_per_token, parameter_count
from pretrain.report.figures import final_loss, last_eval, state_of, unit_of, usual_speed
from pretrain.report.side_by_side import SEED, settings_of
from pretrain.run.history import History
from pretrain.run.run_folder import RunFolder
from pretrain.sweep.scaling import Size, SmallRun, advice, size_table, sizes_of
from shards import ConfigError, DataConfig

_RATE = "optim.learning_rate"
_ORDER = ("lanes", "window_bytes", "plan_version")  # keys of data that decide the order of rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of finished runs")
    parser.add_argument("--config", type=Path, required=True, help="the config of the run to come")
    parser.add_argument("--set", nargs="+", default=[], metavar="key.path=value", help="overrides for that config")
    parser.add_argument("--tokens", type=float, help="that it trains on; default: as train.steps says")
    parser.add_argument(
        "--training-loss", action="store_true", help="go by it, and not by the held-out loss of the last step"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print what the runs say of the config's. Raises HeadraceError if they say nothing."""
    console = Console()
    histories = list(_finished(arguments.runs, console))
    config = load_config(arguments.config, arguments.set)
    target = _target(config, arguments.tokens)
    sizes = sizes_of(_small_runs(histories, arguments.training_loss))
    figure = "training loss" if arguments.training_loss else unit_of(histories)
    console.print(size_table(sizes, figure))
    described = f"target: width {target.width:,}, {target.parameters:,} parameters, {target.tokens:,} tokens"
    told = [described, *_of_other_data(config, histories), *advice(sizes, target, figure)]
    for sentence in told:
        console.print(sentence, soft_wrap=True, highlight=False)
    return 0


def _finished(roots: Sequence[Path], console: Console) -> Iterator[History]:
    """Read the runs that have finished, and name the others. Raises ConfigError if there is no such run."""
    for root in dict.fromkeys(roots):
        RunFolder(root).check_there()
        history = History(root)
        history.refresh()
        if history.is_finished:
            yield history
        else:
            console.print(f"left out: {root} is {state_of(history)}", soft_wrap=True, highlight=False)


def _target(config: RunConfig, tokens: float | None) -> Size:
    """Return the size of the run to come. Raises ConfigError if its number of tokens is not known."""
    if tokens is None:
        if config.train.steps is None:
            raise ConfigError("train.epochs does not say how many tokens the run has; give --tokens")
        tokens = config.tokens_until(config.train.steps)
    return _size(config, int(tokens))


def _size(config: RunConfig, tokens: int) -> Size:
    flops = float(flops_per_token(config.model, config.data.seq_len)) * tokens
    return Size(config.model.dim, parameter_count(config.model), tokens, flops)


def _small_runs(histories: list[History], by_training: bool) -> list[SmallRun]:
    """Read what counts of each run.

    Raises:
        ConfigError: if a run was not scored at its end, or runs on other texts or with other tokenizers than the first.
    """
    differing = settings_of(histories).differing if histories else {}
    other_data = [key for key in differing if _is_of_data(key)]
    if by_training and other_data:
        raise ConfigError(
            f"the runs differ in {', '.join(other_data)}, so their training losses are those of other rows and cannot"
            " be compared; leave out --training-loss, or some of the runs"
        )
    others = [values for key, values in differing.items() if key not in (_RATE, SEED)]
    found = []
    for i, history in enumerate(histories):
        config = load_config(history.folder.config, begun=True)
        loss = final_loss(history) if by_training else _held_out(history, histories[0])
        tokens = config.tokens_until(history.last_step)  # with padding, as those of the target
        speed = usual_speed(history) * tokens / float(history.metrics["tokens"][-1])
        speed *= flops_per_token(config.model, config.data.seq_len)
        small = SmallRun(
            size=_size(config, tokens),
            learning_rate=config.optim.learning_rate,
            settings=json.dumps([values[i] for values in others]),
            loss=loss if math.isfinite(loss) else math.inf,
            flops_per_second=speed if math.isfinite(speed) else 0.0,
            devices=_devices(history),
        )
        found.append(small)
    return found


def _is_of_data(key: str) -> bool:
    """Return whether a key of a run's config decides which rows it has, other than their order."""
    section, _, below = key.partition(".")
    free = (*DataConfig.MAY_CHANGE, *_ORDER)
    return section == "stages" or (section == "data" and below.partition(".")[0] not in free)


def _of_other_data(config: RunConfig, histories: Sequence[History]) -> Iterator[str]:
    """Yield a warning if the target reads other data than the first run."""
    if not histories:
        return
    begun = load_config(histories[0].folder.config, begun=True)
    ours, theirs = (each.data.model_dump(mode="json") for each in (config, begun))
    if others := [f"data.{key}" for key in ours if _is_of_data(f"data.{key}") and ours[key] != theirs[key]]:
        yield (
            f"the target differs from the runs in {', '.join(others)}: its loss is that of the runs' data, on which it"
            " would have to be trained and scored"
        )


def _held_out(history: History, first: History) -> float:
    scored = last_eval(history)
    if scored is None or scored.step != history.last_step:
        raise ConfigError(f"{history.folder.root} was not scored at its last step; give --training-loss")
    if history.suite() != first.suite():
        raise ConfigError(
            f"{history.folder.root} was scored on {history.suite()}, {first.folder.root} on {first.suite()}; give"
            " --training-loss, or score both on one suite"
        )
    return scored.loss


def _devices(history: History) -> str:
    start = history.starts[-1] if history.starts else {}
    names = (start.get("environment") or {}).get("devices") or ["unknown devices"]
    ranks = math.prod(int(start.get(key, 1)) for key in ("tp_size", "sp_size", "dp_size"))
    return f"{ranks} x {', '.join(names)}"
