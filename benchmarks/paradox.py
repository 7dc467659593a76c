"""Train a model and one twice as deep with the small one's learning rate: `python benchmarks/paradox.py`.

With the standard parametrization the deeper model can come out worse, which looks as if more layers did harm; with mup,
whose base is the small model, it comes out better. Sizes are those of a study that met the former: 2.6 and 4.8 million
weights, a vocabulary of 1,000, rows of 64 tokens, dropout 0. The tokenizer is trained on the bundled text, no row of
which is seen twice, so the perplexity of the last steps is one on new text. Prints the perplexity at each rate with the
first seed, and that of all seeds at the small model's best rate and at the standard deep model's own. `--png FILE`
draws it; `--keep FILE` notes each result, and trains none again that is noted.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from small_models import SAMPLE, Kept, batches, make_engine

from pretrain.model.transformer import LlamaConfig
from pretrain.optim import OptimConfig, learning_rate_at
from pretrain.parallel_config import ParallelConfig
from pretrain.run.metrics import Meter
from pretrain.topology import Topology, started
from shards import SourceConfig
from shards.tokenize.training import train_byte_level
from shards.tokenize.training_sample import TrainingSample

ROWS, LENGTH, LAST = 32, 64, 20
DIM, SHALLOW, DEEP, VOCABULARY = 176, 6, 12, 1000


class Model(NamedTuple):
    """One of the three models that are compared; of the shallow one, both parametrizations are the same model."""

    n_layers: int
    parametrization: str = "standard"

    @property
    def config(self) -> LlamaConfig:
        values = {"dim": DIM, "n_layers": self.n_layers, "n_heads": DIM // 16, "ffn_dim": 480, "vocab_size": VOCABULARY}
        if self.parametrization == "mup":
            values |= {"parametrization": "mup", "base": {"dim": DIM, "n_layers": SHALLOW}}
        return LlamaConfig.model_validate(values)

    def __str__(self) -> str:
        return f"{self.n_layers} layers, {self.parametrization}"


MODELS = (Model(SHALLOW), Model(DEEP), Model(DEEP, "mup"))
Perplexities = dict[tuple[Model, float, int], float]  # by model, rate and seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3])
    parser.add_argument("--steps", type=int, default=300, help=f"of {ROWS * LENGTH:,} tokens")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--png", type=Path, help="where to draw a picture")
    parser.add_argument("--keep", type=Path, help="a file of JSON lines, with losses by model, rate and seed")
    arguments = parser.parse_args()
    found: Perplexities = {}
    kept = Kept(arguments.keep)
    with tempfile.TemporaryDirectory() as folder, started(ParallelConfig()) as topology:
        tokenizer = make_tokenizer(Path(folder))

        def train(model: Model, rate: float, seed: int) -> float:
            """Return the perplexity of a model at a rate, which is trained once for a seed."""
            run = functools.partial(last_loss, model, rate, arguments.steps, seed, tokenizer, Path(folder), topology)
            loss = kept.get([*model, rate, arguments.steps, seed], run)
            if (model, rate, seed) not in found:
                found[model, rate, seed] = math.exp(loss)
                print(f"{model} at {rate:.1e}, seed {seed}: {math.exp(loss):.2f}", flush=True)
            return found[model, rate, seed]

        best = {model: min(arguments.rates, key=lambda rate: train(model, rate, 0)) for model in MODELS}
        shared = best[Model(SHALLOW)]
        for seed in range(arguments.seeds):
            for model in MODELS:
                train(model, shared, seed)
            train(Model(DEEP), best[Model(DEEP)], seed)
    print(table(found, arguments.rates, shared, best[Model(DEEP)], arguments.seeds))
    if arguments.png:
        draw(found, arguments.rates, shared, arguments.png)


def make_tokenizer(folder: Path) -> Path:
    """Train a tokenizer on the bundled text; return its file in a folder."""
    sample = TrainingSample(1 << 25)
    for shard in sorted((SAMPLE / "train").glob("pile-*.zst")):
        sample.add_shard(str(shard), SourceConfig(name="pile", paths=[str(shard)]), "fail")
    path = folder / "tokenizer.json"
    path.write_bytes(train_byte_level(sample.drain(), VOCABULARY))
    return path


def last_loss(
    model: Model, rate: float, steps: int, seed: int, tokenizer: Path, index: Path, topology: Topology
) -> float:
    """Train a model; return the mean loss of the last steps in nats; infinite if it has diverged."""
    optim = OptimConfig(learning_rate=rate, schedule="cosine", warmup_steps=steps // 10)
    engine = make_engine(model.config, optim, ROWS, topology, seed)
    rows = batches(ROWS, LENGTH, seed, index, tokenizer)
    losses = [
        engine.train_step(
            tokens, segment_ids, n_targets, step, learning_rate_at(step, optim, steps), Meter()
        ).loss
        for step, (tokens, segment_ids, n_targets) in zip(range(steps), rows, strict=False)
    ]  # fmt: skip
    mean = statistics.mean(losses[-LAST:])
    return mean if math.isfinite(mean) else math.inf


def table(found: Perplexities, rates: Sequence[float], shared: float, own: float, seeds: int) -> str:
    """Return two Markdown tables: perplexities by rate, and by seed at the two rates that matter."""
    lines = [
        f"| model | weights | {' | '.join(f'{rate:.1e}' for rate in rates)} |",
        "|" + "---|" * (len(rates) + 2),
    ]
    for model in MODELS:
        values = " | ".join(f"{found[model, rate, 0]:.1f}" for rate in rates)
        lines.append(f"| {model} | {weights(model):,} | {values} |")
    lines += ["", f"| model | rate | {' | '.join(f'seed {seed}' for seed in range(seeds))} | mean |"]
    lines.append("|" + "---|" * (seeds + 3))
    compared = [(model, shared) for model in MODELS] + ([(Model(DEEP), own)] if own != shared else [])
    for model, rate in compared:
        values_of = [found[model, rate, seed] for seed in range(seeds)]
        values = " | ".join(f"{value:.1f}" for value in values_of)
        lines.append(f"| {model} | {rate:.1e} | {values} | {statistics.mean(values_of):.1f} |")
    return "\n".join(lines)


def weights(model: Model) -> int:
    """Count the weights of a model."""
    config = model.config
    block = 4 * config.dim**2 + 3 * config.dim * config.hidden_dim + 2 * config.dim
    return config.n_layers * block + 2 * config.vocab_size * config.dim + config.dim


def draw(found: Perplexities, rates: Sequence[float], shared: float, path: Path) -> None:
    """Draw the perplexity of each model over the rate, with the small model's best rate marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(5.5, 3.4), layout="constrained", dpi=110)
    FigureCanvasAgg(picture)
    axes = picture.subplots()
    for model, color, style in zip(MODELS, ("#777777", "#c0392b", "#2471a3"), ("o--", "s-", "o-"), strict=True):
        values = [found[model, rate, 0] for rate in rates]
        shown = [(rate, value) for rate, value in zip(rates, values, strict=True) if math.isfinite(value)]
        axes.semilogx(*zip(*shown, strict=True), style, color=color, ms=4, label=str(model))
    axes.axvline(shared, color="#777777", ls=":", lw=1, label=f"best rate of {SHALLOW} layers")
    axes.set_xticks(list(rates), [f"{rate:.0e}" for rate in rates])
    axes.minorticks_off()
    axes.set_xlabel("learning rate")
    axes.set_ylabel(f"perplexity of the last {LAST} steps")
    lowest = min(found.values())
    axes.set_ylim(lowest * 0.95, min(lowest * 3, max(v for v in found.values() if math.isfinite(v)) * 1.05))
    axes.legend(fontsize=8)
    picture.savefig(path)


if __name__ == "__main__":
    main()
