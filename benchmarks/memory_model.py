"""Compare the estimate of a rank's memory with a simulated training step: `python benchmarks/memory_model.py`.

The simulated step is the engine's own, DeepSpeed's optimizer and all, with tensors that have shapes and no memory
(FakeTensorMode) and collectives that reach nobody (torch's fake process group). It counts the bytes of all tensors that
are alive at once, in a second step of two micro-steps, when gradients and optimizer states exist.

It is to be a step on a GPU, with tensors that say that they lie on the CPU: norms are one kernel, as on CUDA; compiled
blocks are cut into forward and backward pass as inductor does it, and what it would fuse takes no memory. It leaves out
the CUDA context, NCCL's buffers, and the allocator's rounding and gaps.

    python benchmarks/memory_model.py                   # the shipped configs, with each way to save activations
    python benchmarks/memory_model.py 'llama-1b-dolma 8 parallel.zero_stage=2' 'my.yaml 1' --json

A case is a config, the number of data-parallel ranks, and overrides. Each gives a line with the estimate and the
simulation, and of the latter the states between two steps and the peak of each part, in GB. The exit code is 1 where
estimate and simulation differ by more than a tenth.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import json
import math
import multiprocessing
import operator
import os
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args
from unittest import mock

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # looking for one, DeepSpeed would write to stdout

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel import initialize as fairscale_groups
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.config import RunConfig, load_config
from pretrain.engine import Engine
from pretrain.model.loss import CHUNK_LOGITS, Targets
from pretrain.model.pieces import Pieces, pieces_of
from pretrain.model.sequence import own_part
from pretrain.model.size import memory_per_rank
from pretrain.model.swiglu import swiglu, swiglu_backward
from pretrain.parallel_config import Checkpointing
from pretrain.run.metrics import Meter
from pretrain.topology import Topology

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = (
    ("quickstart", 1),
    ("llama-125m-pile", 8),
    ("llama-1b-dolma", 8),
    ("llama-7b-pile-dolma", 64),
    ("llama-7b-pile-dolma-tp2", 32),
)
TOLERANCE = 0.1
MICRO_STEPS = 2  # a first one, and one that adds to its gradients
# Operators whose own tensors count: the functions that they are made of, by their operators
TILED = {
    torch.ops.headrace.swiglu.default: swiglu._init_fn,
    torch.ops.headrace.swiglu_backward.default: swiglu_backward._init_fn,
}


@dataclass(frozen=True)
class Simulation:
    """The bytes that one rank held in a simulated step.

    Attributes:
        states: bytes between two steps: weights, gradient sums, optimizer.
        peak: the most bytes at once.
        peaks: the same by the engine's parts of a step.
        collectives: bytes that each kind of collective scattered, gathered or reduced in the step.
        host_peak: the most bytes of blocks' inputs that lay on the host at once.
    """

    states: int
    peak: int
    peaks: dict[str, int]
    collectives: dict[str, int]
    host_peak: int


class Ledger(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and answers questions about values that fake tensors lack."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}  # by storage
        self.alive = self.peak = 0
        self.on_host = self.host_peak = 0
        self._copies = False  # whether what comes next lies on the host
        self.in_registers = False  # whether a fused kernel makes what comes next, and nothing but that kernel reads it
        self.collectives: Counter[str] = Counter()  # bytes by operation

    supports_higher_order_operators = True  # those with which compiled blocks compute again what was not kept

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # otherwise torch.compile would leave its blocks uncompiled

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # as a real one does; a fake one makes a new tensor
        if function in TILED:
            with self:  # what it computes with counts too
                return TILED[function](*args)
        try:
            made = function(*args, **(kwargs or {}))
        except DataDependentOutputException:
            return 0  # a loss, a norm or a flag for the host: with zeros a step is taken as usual
        if function.namespace in ("c10d", "_c10d_functional"):
            # What is scattered, gathered, or reduced as a whole
            sizes = [tensor.nbytes for tensor in tree_leaves((args, made)) if isinstance(tensor, Tensor)]
            self.collectives[function._opname] += max(sizes, default=0)
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":  # DeepSpeed makes some of these itself
                self._enter(tensor.untyped_storage())
        return made

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0 if self.in_registers or self._copies else storage.nbytes()
            self.alive += self._sizes[key]
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)

    def copy_on_host(self, tensor: Tensor) -> Tensor:
        """Return a copy that takes memory on the host and none here."""
        self._copies = True
        copy = torch.empty_like(tensor)
        self._copies = False
        self.on_host += copy.nbytes
        self.host_peak = max(self.host_peak, self.on_host)
        weakref.finalize(copy.untyped_storage(), self._leave_host, copy.nbytes)
        return copy

    def _leave_host(self, size: int) -> None:
        self.on_host -= size


class PeakMeter(Meter):
    """Notes the most bytes that were alive in each part of a step."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger
        self.peaks: dict[str, int] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        before, self._ledger.peak = self._ledger.peak, self._ledger.alive
        yield
        self.peaks[name] = max(self.peaks.get(name, 0), self._ledger.peak)
        # A part inside another, such as a collective of the backward pass, takes nothing from its peak
        self._ledger.peak = max(before, self._ledger.peak)


class FusedKernels(torch.fx.Interpreter):
    """Runs a compiled graph, and leaves out of the ledger what a fused kernel would keep in registers.

    Those are the results of operations by element that only operations by element and reductions read; inductor fuses
    such chains.
    """

    def __init__(self, graph: torch.fx.GraphModule, ledger: Ledger) -> None:
        super().__init__(graph)
        self._ledger = ledger

    def run_node(self, node: torch.fx.Node) -> Any:
        self._ledger.in_registers = _by_element(node) and not _is_written(node)
        try:
            return super().run_node(node)
        finally:
            self._ledger.in_registers = False


def _by_element(node: torch.fx.Node) -> bool:
    operation = node.target
    if not isinstance(operation, torch._ops.OpOverload):
        return operation is operator.getitem
    return operation.is_view or torch.Tag.pointwise in operation.tags or operation is torch.ops.aten.cat.default


def _is_written(node: torch.fx.Node) -> bool:
    """Return whether anything reads a node, or a view of it, that is not part of a fused kernel."""
    for user in node.users:
        if user.op == "output" or not (_by_element(user) or torch.Tag.reduction in getattr(user.target, "tags", ())):
            return True
        if isinstance(user.target, torch._ops.OpOverload) and user.target.is_view and _is_written(user):
            return True
    return False


def backend(ledger: Ledger) -> Any:
    """Return a backend for torch.compile that cuts graphs in forward and backward pass as inductor does."""

    def compiler(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        return make_boxed_func(lambda *inputs: FusedKernels(graph, ledger).boxed_run(list(inputs)))

    return aot_autograd(
        fw_compiler=compiler,
        bw_compiler=compiler,
        partition_fn=functools.partial(min_cut_rematerialization_partition, compiler="inductor"),
        decompositions=select_decomp_table,
    )


class _FusedNorm(torch.autograd.Function):
    """RMSNorm as CUDA's kernel, which keeps its input and a number a row; on CPUs it is several operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _shape: Any, weight: Tensor, _eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None, torch.empty_like(weight), None


_rms_norm = F.rms_norm


def _norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
    if torch.compiler.is_compiling():
        return _rms_norm(x, shape, weight, eps)  # inductor fuses the operations by itself
    return _FusedNorm.apply(x, shape, weight, eps)


def _one_piece_a_row(segment_ids: Tensor, device: torch.device) -> Pieces:
    """Find pieces where segment ids have no values: as if each row were one."""
    with unset_fake_temporarily():
        return pieces_of(torch.ones(segment_ids.shape, dtype=torch.int64), device)


def _all_targets(tokens: Tensor, _segment_ids: Tensor) -> Targets:
    """Return a target for each position, since fake segment ids do not tell which have none."""
    targets = own_part(tokens[:, 1:])
    return Targets(torch.arange(targets.numel()), targets.flatten())


def _apply_in_place(module: nn.Module, convert: Any, recurse: bool = True) -> nn.Module:
    """Do what nn.Module._apply does, without swapping tensors, which fake ones do not allow."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.data = convert(parameter.data)
    return module


@contextlib.contextmanager
def simulated(config: RunConfig, dp_size: int, ledger: Ledger) -> Iterator[Topology]:
    """Take part in a training of ranks that do not exist, as rank 0, with tensors that have no memory."""
    tp_size, sp_size = config.parallel.tp_size, config.parallel.sp_size
    sizes = (dp_size, sp_size, tp_size)
    dist.init_process_group("fake", rank=0, world_size=math.prod(sizes), store=FakeStore())
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "sp", "tp"))
    patches = [
        mock.patch.object(fairscale_groups, "_DATA_PARALLEL_GROUP", mesh["dp", "sp"]._flatten("zero").get_group()),
        mock.patch.object(fairscale_groups, "_MODEL_PARALLEL_GROUP", mesh.get_group("tp")),
        mock.patch("pretrain.topology._sequence_group", mesh.get_group("sp") if sp_size > 1 else None),
        mock.patch.dict(os.environ, LOCAL_RANK="0"),
        mock.patch.object(nn.Module, "_apply", _apply_in_place),
        mock.patch.object(F, "rms_norm", _norm),
        mock.patch.object(Tensor, "tolist", lambda tensor: [0.0] * tensor.numel()),
        # Other ranks' pieces of matrices are not known, so Muon can only be simulated on a single rank.
        mock.patch.object(Topology, "gather_objects", lambda topology, value: [value] * topology.world_size),
        mock.patch.object(gc, "collect"),  # DeepSpeed does it thirty times at a start
        mock.patch("pretrain.model.transformer.pieces_of", _one_piece_a_row),
        mock.patch("pretrain.model.recurrent.pieces_of", _one_piece_a_row),
        mock.patch("pretrain.engine.next_token_targets", _all_targets),
        mock.patch("pretrain.model.offloading.on_host", ledger.copy_on_host),
        mock.patch("pretrain.model.loss._CACHED_LOGITS", CHUNK_LOGITS // 4),  # as on CUDA
        mock.patch("torch.compile", functools.partial(torch.compile, backend=backend(ledger))),
        # These compare with values from other ranks.
        mock.patch("deepspeed.runtime.zero.partitioned_param_coordinator.assert_ints_same_as_other_ranks"),
    ]
    with contextlib.ExitStack() as stack, FakeTensorMode(allow_non_fake_inputs=True):
        for patch in patches:
            stack.enter_context(patch)
        yield Topology(0, math.prod(sizes), 0, tp_size, 0, dp_size, torch.device("cpu"), 0, sp_size)
    dist.destroy_process_group()


def simulate(config: RunConfig, dp_size: int) -> Simulation:
    """Run two steps of the engine on one of dp_size x sp_size x tp_size ranks, and measure the second."""
    rows = config.stage_at(0).micro_batch_size(dp_size)
    ledger = Ledger()
    meter = PeakMeter(ledger)
    with simulated(config, dp_size, ledger) as topology, ledger:
        parts = config.model, config.optim, config.parallel, config.deepspeed_config()
        engine = Engine(*parts, rows, MICRO_STEPS, topology, config.run.seed)
        tokens = torch.zeros(MICRO_STEPS * rows, config.data.seq_len + 1, dtype=torch.int64)
        states = 0
        for step in range(2):
            meter.peaks, states = {}, ledger.alive
            ledger.collectives.clear()
            engine.train_step(tokens, torch.ones_like(tokens), 1, step, 1e-4, meter)
    return Simulation(states, max(meter.peaks.values()), meter.peaks, dict(ledger.collectives), ledger.host_peak)


def shipped() -> Iterator[str]:
    """Yield a case for each shipped config and each way to save activations."""
    for name, dp_size in SHIPPED:
        splits = ("false", "true") if load_config(_path(name)).parallel.tp_size > 1 else ("false",)
        for compiled, checkpointing, split in itertools.product(("false", "true"), get_args(Checkpointing), splits):
            settings = {"compile": compiled, "activation_checkpointing": checkpointing, "sequence_parallel": split}
            yield " ".join([name, str(dp_size), *(f"parallel.{key}={value}" for key, value in settings.items())])


def _path(name: str) -> Path:
    return Path(name) if name.endswith(".yaml") else ROOT / "configs" / f"{name}.yaml"


def compare(case: str) -> dict[str, object]:
    """Simulate one case and set the estimate beside it."""
    warnings.simplefilter("ignore")
    name, dp_size, *overrides = case.split()
    config = load_config(_path(name), overrides)
    found, estimate = simulate(config, int(dp_size)), memory_per_rank(config.workload(int(dp_size)))
    return {
        "case": case,
        "estimate": estimate.total,
        "simulation": found.peak,
        "off": estimate.total / found.peak - 1,
        "states": found.states,
        "host": found.host_peak,
        **found.peaks,
        "collectives": found.collectives,
    }


def _log_to_stderr() -> None:
    """Leave stdout to the figures: DeepSpeed and torch log to it in the processes that simulate."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="'CONFIG DP_SIZE [key.path=value ...]'")
    parser.add_argument("--json", action="store_true", help="one object a line, in bytes")
    arguments = parser.parse_args()
    worst = 0.0
    # Each case needs a process group and DeepSpeed's globals to itself.
    for case in arguments.cases or shipped():
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork"), _log_to_stderr) as process:
            found = process.submit(compare, case).result()  # an error if the process was killed, say for its memory
        worst = max(worst, abs(float(str(found["off"]))))
        print(json.dumps(found) if arguments.json else _line(found), flush=True)
    return int(worst > TOLERANCE)


def _line(found: dict[str, Any]) -> str:
    names = ("estimate", "simulation", "states", "forward_backward", "optimizer")
    figures = "  ".join(f"{name} {found[name] / 1e9:.2f}" for name in names)
    return f"{found['case']}\n    {figures}  {found['off']:+.0%}"


if __name__ == "__main__":
    sys.exit(main())
