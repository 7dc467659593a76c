"""How fast `benchmarks/gpu.py` finds a shipped config to train, under one setting after another."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from device_trace import device_times, synchronizations
from step_profile import step_profile
from throughput import Training

from pretrain.config import RunConfig, load_config
from pretrain.model.attention_choice import with_fastest_attention
from pretrain.model.size import flops_per_token, memory_per_rank, parameter_count
from pretrain.topology import Topology, started

Result = dict[str, object]

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@dataclass(frozen=True)
class Point:
    """Settings to try: overrides of a config, the micro-batch, and the documents' length in tokens (None: a row's)."""

    micro_batch_size: int
    overrides: tuple[str, ...] = ()
    document_tokens: int | None = None
    traced: bool = False  # whether to look into a step: kernels, and where the host waits

    @property
    def name(self) -> str:
        parts = [f"{self.micro_batch_size} rows", *(text.removeprefix("parallel.") for text in self.overrides)]
        parts += [f"documents of {self.document_tokens}"] if self.document_tokens else []
        return ", ".join(parts)


SELECTIVE, FULL = "parallel.activation_checkpointing=selective", "parallel.activation_checkpointing=full"
EAGER, FLEX = "parallel.compile=false", "parallel.attention=flex"
TILES, MOVED = "parallel.feed_forward_tokens=4096", "parallel.offload=activations"

LONG = ("data.seq_len=131072", FULL, EAGER), ("data.seq_len=32768", FULL, EAGER)  # compiling would take too long

# The most promising first, since time may run out.
POINTS = {
    "125m": (Point(16, traced=True), Point(32), Point(16, (EAGER,)), Point(16, (FLEX,))),
    "1b": (
        Point(8, traced=True),
        Point(16, (SELECTIVE,)),
        Point(8, (FLEX,)),
        Point(8, (EAGER,)),
        Point(16),
        Point(8, document_tokens=400),
        Point(32, (FULL,)),
        Point(8, ("parallel.attention=sdpa",)),
    ),
    "7b": (
        Point(1, (SELECTIVE,), traced=True),
        Point(2, (FULL,)),
        Point(2, (SELECTIVE,)),
        Point(1, (SELECTIVE, FLEX)),
    ),
    "long": (
        Point(1, (*LONG[1], TILES, MOVED)),
        Point(1, (*LONG[0], TILES, MOVED)),
        Point(1, LONG[1]),
        Point(1, (*LONG[1], TILES)),
        Point(1, LONG[0]),
    ),
}
FILES = {"125m": "llama-125m-pile.yaml", "1b": "llama-1b-dolma.yaml", "7b": "llama-7b-pile-dolma.yaml"}
FILES["long"] = FILES["1b"]
# An update of the weights takes the longer, the larger the model
MICRO_STEPS = {"125m": 2, "1b": 2, "7b": 4, "long": 1}
# Steps that are measured, and those before; one of a row of 131,072 tokens takes a quarter of a minute
STEPS = {"125m": (4, 2), "1b": (4, 2), "7b": (4, 2), "long": (1, 1)}
TINY = (
    "model.dim=64", "model.n_heads=4", "model.n_layers=2", "model.ffn_dim=128", "model.vocab_size=512",
    "data.seq_len=64", "metrics.peak_flops=1e11",
)  # fmt: skip
MEMORY_SHARE = 0.92  # of a device that a model may be estimated to need


def training(model: str, tiny: bool, ends: float) -> Iterator[Result]:
    """Try the settings of a model one after another; of a model too large, as many layers as fit.

    Args:
        tiny: whether to take sizes that only show that the program runs.
        ends: when to begin nothing new any more, by `time.monotonic`.
    """
    overrides, last = ["parallel.zero_stage=1", "parallel.activation_checkpointing=none"], TINY if tiny else ()
    file = CONFIGS / FILES[model]
    with started(load_config(file, [*overrides, *last]).parallel) as here:
        fastest = None
        for point in POINTS[model]:
            label: Result = {"model": model, "settings": point.name}
            if time.monotonic() > ends:
                yield label | {"not_run": "no time left"}
                continue
            try:
                config = load_config(file, [*overrides, *point.overrides, *last])
                if config.parallel.attention == "auto":
                    shape = config.attention_shape(here.dp_size, config.stage_at(0))
                    fastest = fastest or with_fastest_attention(config.parallel, here, shape).attention
                    parallel = config.parallel.model_copy(update={"attention": fastest})
                    config = config.model_copy(update={"parallel": parallel})
                yield from label_all(label, try_layers(config, point, here, model))
            except Exception as error:  # the next settings may work
                yield label | {"not_run": f"{type(error).__name__}: {str(error)[:300]}"}
            forget(here.device)


def label_all(label: Result, results: Iterator[Result]) -> Iterator[Result]:
    return (label | result for result in results)


def try_layers(config: RunConfig, point: Point, here: Topology, model: str) -> Iterator[Result]:
    """Try as many layers as are estimated to fit; if they do not, fewer."""
    for share in (MEMORY_SHARE, MEMORY_SHARE * 0.75):
        fitting = fitted(config, point, here, share)
        try:
            yield try_point(fitting, config, point, here, model)
            return
        except torch.OutOfMemoryError as error:
            yield {"layers": fitting.model.n_layers, "not_run": str(error)[:200]}
        forget(here.device)


def fitted(config: RunConfig, point: Point, here: Topology, share: float) -> RunConfig:
    """Return the config with the most layers that are estimated to fit into a share of the device's memory."""
    if here.device.type != "cuda":
        return config
    memory = share * torch.cuda.get_device_properties(here.device).total_memory
    layers = config.model.n_layers
    while layers > 1:
        fitting = config.model_copy(update={"model": config.model.model_copy(update={"n_layers": layers})})
        work = dataclasses.replace(fitting.workload(here.dp_size), micro_batch_size=point.micro_batch_size)
        if memory_per_rank(work).total <= memory:
            break
        layers -= 1
    return fitting


def try_point(config: RunConfig, whole: RunConfig, point: Point, here: Topology, model: str) -> Result:
    """Train some steps with the settings of a point; return what they took."""
    on_cuda = here.device.type == "cuda"
    left_over = torch.cuda.memory_allocated() if on_cuda else 0
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    micro_steps, (steps, warmup) = MICRO_STEPS[model], STEPS[model]
    training = Training(config, here, point.micro_batch_size, micro_steps, point.document_tokens)
    result: Result = {
        "layers": config.model.n_layers,
        "attention": config.parallel.attention,
        "parameters": parameter_count(config.model),
        "micro_batch_size": point.micro_batch_size,
        "micro_steps": micro_steps,
        "start_seconds": round(time.perf_counter() - begin, 1),
        "left_over_gb": round(left_over / 1e9, 2),
    }
    result |= training.measure(steps, warmup)
    if config.model.n_layers < whole.model.n_layers:
        result |= projected(config, whole, result)
    if on_cuda:
        result["waits_by_line"] = synchronizations(training.step)
    if point.traced:
        result["trace"] = device_times(training.step) if on_cuda else step_profile(training.step, 1)
    training.engine.deepspeed.destroy()
    return result


def projected(config: RunConfig, whole: RunConfig, result: Result) -> Result:
    """Return what the whole model would do, if all of its operations went as fast as those of this part."""
    peak = flops_per_token(whole.model, config.data.seq_len)
    part = flops_per_token(config.model, config.data.seq_len)
    speed = float(str(result["tokens_per_second"]))
    return {"layers_of_whole": whole.model.n_layers, "tokens_per_second_of_whole": round(speed * part / peak)}


def forget(device: torch.device) -> None:
    """Free what settings leave behind, so that the next ones find the device as these did."""
    gc.collect()
    torch._dynamo.reset()  # beyond a number of variants of a block torch would give up compiling it
    if device.type == "cuda":
        torch.cuda.empty_cache()
