"""DeepSpeed, wrapped: one optimizer step over a rank's rows, forward passes for evaluation, its checkpoint files.

With zero_pieces the only importer of deepspeed. It works around DeepSpeed where the design
differs: its loss is a mean of means, its ZeRO-0 is unusable, its optimizers compile at first use.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param
from torch import Tensor

from pretrain.checkpoint.state_hash import StateHash
from pretrain.checkpoint.universal import read_piece
from pretrain.deepspeed_keys import DeepSpeedConfig, batch_sizes
from pretrain.gradient_noise import MicroBatchNorms
from pretrain.host_memory import keep_freed_memory
from pretrain.layer_figures import LayerMeasurement
from pretrain.model.architecture import Cache, ModelConfig
from pretrain.model.attention_choice import attention_backend
from pretrain.model.compilation import CompilationLog
from pretrain.model.lora import is_adapter
from pretrain.model.loss import Loss, Scores, Targets, next_token_targets, target_scores, training_loss
from pretrain.model.offloading import keep_inputs_on_host
from pretrain.model.parallel import padded_for
from pretrain.model.prefill import next_logits
from pretrain.model.weights import Weights
from pretrain.mpu import ModelParallelUnit
from pretrain.muon import Muon, make_optimizer
from pretrain.optim import OptimConfig, parameter_groups
from pretrain.parallel_config import ParallelConfig
from pretrain.rng import derive_seed, seeded
from pretrain.run.metrics import Meter
from pretrain.saved_weights import load_trained, trained_state, universal_info
from pretrain.step_hooks import CommunicationTimer, refusing
from pretrain.step_stats import NO_LIMITS, Limits, StepStats
from pretrain.topology import Topology
from pretrain.weight_average import WeightAverage
from pretrain.weight_hash import state_hash
from pretrain.zero_pieces import set_whole
from shards import CheckpointError


class _CallbackCheckpointEngine(TorchCheckpointEngine):  # type: ignore[misc]  # DeepSpeed has no types
    """Passes what DeepSpeed would write to a function instead; DeepSpeed still does the reading."""

    def __init__(self, take: Callable[[Path, object], None]) -> None:
        super().__init__()
        self._take = take

    def save(self, state_dict: object, path: str) -> None:
        self._take(Path(path), state_dict)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Do nothing: the folder exists, and a rank that failed here would keep the others waiting."""

    def preserves_storage_sharing(self) -> bool:
        return False  # otherwise DeepSpeed copies the weights, into fresh memory each time


class Engine:
    """The model under DeepSpeed ZeRO.

    Args:
        model_config, optim_config, parallel: the parts of the run's config that it implements.
        ds_config: what `deepspeed_keys.deepspeed_config` derived from them.
        micro_batch_size, micro_steps: rows of one forward pass on this rank, and forward passes in one optimizer step.
        topology: this process's place among the ranks.
        seed: the run's seed; weights and dropout are drawn from it.
        noise_scale: whether to estimate the gradient's noise in each step. With split rows it is not: what a rank adds
            to the gradient is not that of its own tokens' loss, since other ranks' attend to them.
    Attributes:
        attention: the backend that computes attention; "none" if the model has none.
        average: the moving average of the weights, if one is kept.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        optim_config: OptimConfig,
        parallel: ParallelConfig,
        ds_config: DeepSpeedConfig,
        micro_batch_size: int,
        micro_steps: int,
        topology: Topology,
        seed: int,
        noise_scale: bool = False,
    ) -> None:
        self.optim_config = optim_config
        self.topology = topology
        self.seed = seed
        self.micro_batch_size = micro_batch_size
        if topology.device.type == "cpu":
            keep_freed_memory()
        # fairscale's layers allocate on the CPU; the weights are drawn on the device where they are trained.
        dtype = torch.bfloat16 if ds_config["bf16"]["enabled"] else torch.float32
        backend = attention_backend(parallel, topology, model_config.heads, dtype)
        self.attention = backend if model_config.heads else "none"
        model = model_config.make(parallel, backend)
        for parameter in model.parameters():
            if not parameter.requires_grad:  # in fp32 there would be more of them for a moment than ever again
                parameter.data = torch.empty_like(parameter, dtype=dtype, device=topology.device)
        model.to(topology.device).initialize(seed)
        if parallel.offloads_activations:
            keep_inputs_on_host(model.blocks)
        self.model = model
        self._split_tokens = parallel.sequence_parallel
        self._loss = functools.partial(
            training_loss, z_loss=optim_config.z_loss, compiled=parallel.compile and topology.device.type == "cuda"
        )
        self._compilations = CompilationLog()
        self._universal_info = universal_info(model)
        self._groups = parameter_groups(model.named_parameters(), optim_config, model_config.scale_of)
        optimizer = make_optimizer(self._groups, optim_config, topology, seed, dtype)
        # On CPUs the first start would compile this op, which takes a minute and is only used for inference.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if type(optimizer) not in ZERO_SUPPORTED_OPTIMIZERS:
            ZERO_SUPPORTED_OPTIMIZERS.append(type(optimizer))  # it would refuse one that it does not know
        if parallel.applied_zero_stage == 3:
            # Hooks on a block rather than on each layer in it, so that a block is gathered at once and can be compiled.
            deepspeed.utils.set_z3_leaf_modules(model, [type(model.blocks[0])])
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its memory use six times
            self.deepspeed, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=ds_config | batch_sizes(micro_batch_size, micro_steps, topology.zero_size),
                mpu=ModelParallelUnit(topology),
                dist_init_required=False,
            )

        self.average = WeightAverage(model, self.deepspeed.optimizer, topology)
        self._norms = MicroBatchNorms(model, topology, noise_scale and topology.sp_size == 1)
        if isinstance(optimizer, Muon):
            optimizer.locate(self.deepspeed.optimizer)
        self._communication = CommunicationTimer(deepspeed.comm.comm.cdb)
        # Its own would keep the second name of a frozen weight that two layers share.
        self.deepspeed.module_state_dict = lambda **_: trained_state(model)
        # DeepSpeed would copy two of its scripts into every checkpoint, but the package has them anyway.
        self.deepspeed._copy_recovery_script = lambda folder: None

    def adopt(self, model_config: ModelConfig) -> None:
        """Compute positions from now on as another config of the model says, between two steps."""
        self.model.adopt(model_config)

    def set_batches(self, micro_batch_size: int, micro_steps: int) -> None:
        """Change the batches of the steps to come, between two steps; the arguments are those of the class."""
        self.micro_batch_size = micro_batch_size
        sizes = batch_sizes(micro_batch_size, micro_steps, self.topology.zero_size)
        for name, size in sizes.items():
            setattr(self.deepspeed._config, name, size)
        self.deepspeed.optimizer.gradient_accumulation_steps = micro_steps
        self.deepspeed.micro_steps = 0  # from which it counts to a step's last micro-step

    def train_step(
        self,
        tokens: Tensor,
        segment_ids: Tensor,
        n_targets: int,
        step: int,
        learning_rate: float,
        meter: Meter,
        measured: bool = False,
        limits: Limits = NO_LIMITS,
    ) -> StepStats:
        """Make one optimizer step.

        Args:
            tokens: [rows, seq_len + 1] int64 on the device: this dp rank's rows of the global batch.
            segment_ids: [rows, seq_len + 1] int64 on the host.
            n_targets: valid targets of the *global* batch, by which the sum of their losses is divided, however
                they are spread over ranks and micro-steps. Without any, nothing is changed, since momentum and
                weight decay would still move the weights.
            step: from 0; seeds the dropout.
            learning_rate: learning rate of this step.
            meter: times "forward_backward", "forward" as a part of it, and "optimizer"; and DeepSpeed's collectives, in
                which a rank waits for others, as "forward_communication" and so on.
            measured: whether to measure the layers' figures.
            limits: the same on every rank, so that all refuse the same steps.
        """
        if n_targets == 0:
            return StepStats(math.nan, math.nan, math.nan, applied=False)
        micro_batches = list(
            zip(*(torch.split(rows, self.micro_batch_size) for rows in (tokens, segment_ids)), strict=True)
        )
        assert len(micro_batches) == self.deepspeed.gradient_accumulation_steps(), "or it would make several steps"
        # Before the step, which is not warned of what these passes compile
        measurement = self._measure_activations(micro_batches, meter) if measured else None
        with self._compilations.step(step + 1), self._communication.charging(meter):
            return self._train_step(micro_batches, n_targets, step, learning_rate, meter, measurement, limits)

    def _train_step(
        self,
        micro_batches: Sequence[tuple[Tensor, Tensor]],
        n_targets: int,
        step: int,
        learning_rate: float,
        meter: Meter,
        measurement: LayerMeasurement | None,
        limits: Limits,
    ) -> StepStats:
        device = self.topology.device
        self.deepspeed.train()
        for group, own in zip(self.deepspeed.optimizer.param_groups, self._groups, strict=True):
            group["lr"] = learning_rate * own["learning_rate_scale"]
        self._norms.begin(len(micro_batches))
        sums = torch.zeros(2, dtype=torch.float64, device=device)  # nll and z-loss
        # DeepSpeed averages gradients over ranks, but the loss is a sum over them.
        scale = torch.full((), self.topology.zero_size / n_targets, device=device)  # no copy from the host
        for micro_step, (ids, segments) in enumerate(micro_batches):
            if micro_step:
                self.deepspeed.step()  # inside a step it only counts the micro-step
            with meter.device_part("forward_backward"), seeded(self._dropout_seed(step, micro_step), device):
                with meter.device_part("forward"), self._communication.phase("forward"):
                    loss = self._forward(ids, segments)
                # DeepSpeed skips a step on all ranks if its gradient is not finite; that of an infinite loss may be
                scaled = loss.total * torch.where(loss.total.isfinite(), scale, torch.nan)
                with self._communication.phase("backward"):
                    self.deepspeed.backward(scaled, scale_wrt_gas=False)
                self._norms.end_micro_batch(len(loss.nll))
            z_loss = self.optim_config.z_loss * loss.logsumexp.square().sum()
            sums += torch.stack((loss.nll.sum(), z_loss)).double()
        # Before the update, which a limit of the loss may refuse; DeepSpeed waits for the gradient's norm anyway.
        # The same bits on all tensor-parallel ranks, so that they refuse together
        sums = self.topology.broadcast_in_tp(self.topology.sum_over_zero(sums))
        loss, z_loss_mean = (sums / n_targets).tolist()
        with meter.device_part("optimizer"), self._refusing(loss, limits) as refused:
            if measurement:
                measurement.before_update()
            self.deepspeed.step()
            layers = measurement.finish() if measurement else None
        applied = not self.deepspeed.optimizer.overflow
        if not applied:
            self._forget_gradients()
        norm = refused[0] if refused else float(self.deepspeed.get_global_grad_norm())
        noise = self._norms.finish(norm, n_targets) if applied else None
        return StepStats(loss, z_loss_mean, norm, applied, layers, bool(refused), noise)

    def _refusing(self, loss: float, limits: Limits) -> contextlib.AbstractContextManager[list[float]]:
        """Let DeepSpeed refuse the step's update above its limits; see `step_hooks.refusing`."""
        if limits == NO_LIMITS:
            return contextlib.nullcontext([])
        step = StepStats(loss, 0.0, 0.0, applied=False)
        return refusing(self.deepspeed.optimizer, lambda norm: replace(step, grad_norm=norm).exceeds(limits))

    @torch.no_grad()
    def _measure_activations(self, micro_batches: Sequence[tuple[Tensor, Tensor]], meter: Meter) -> LayerMeasurement:
        """Begin to measure the layers by passes without dropout, of which the step's time knows nothing."""
        measurement = LayerMeasurement(self.model, self.deepspeed.optimizer, self.topology)
        self.deepspeed.eval()
        with meter.paused():
            for ids, segments in micro_batches:
                with measurement.activations.of(segments[:, :-1]):
                    self.deepspeed(ids[:, :-1], segments[:, :-1], head=lambda hidden, _: hidden)
            measurement.end_activations()
        return measurement

    def _forget_gradients(self) -> None:
        """Drop the gradients that DeepSpeed keeps of a skipped step.

        ZeRO-1 and 2 with offload clear them only after an applied step. Otherwise the next step would add to them, and
        no step would ever be finite again.
        """
        # BF16_Optimizer (ZeRO-1 in bf16 without offload) has no such dictionary.
        getattr(self.deepspeed.optimizer, "averaged_gradients", {}).clear()

    def _dropout_seed(self, step: int, micro_step: int) -> int:
        """Return a seed that differs on ranks with different tokens."""
        topology = self.topology
        tokens_of: list[str | int] = [topology.tp_rank] if self._split_tokens else []
        tokens_of += ["sp", topology.sp_rank] if topology.sp_size > 1 else []
        return derive_seed(self.seed, "dropout", step, micro_step, topology.dp_rank, *tokens_of)

    def _forward(self, tokens: Tensor, segment_ids: Tensor) -> Loss:
        """Compute the loss of a micro-batch [rows, seq_len + 1]."""
        head = functools.partial(self._loss, targets=next_token_targets(tokens, segment_ids))
        return self.deepspeed(tokens[:, :-1], segment_ids[:, :-1], head)

    @torch.no_grad()
    def score(self, tokens: Tensor, segment_ids: Tensor, targets: Targets) -> Scores:
        """Score targets that follow positions of tokens [B, T], without dropout or gradients."""
        self.deepspeed.eval()
        return self.deepspeed(tokens, segment_ids, functools.partial(target_scores, targets=targets))

    @torch.no_grad()
    def next_logits(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Return this rank's slice [B, vocab_size / tp_size] of the logits after tokens [B, T] that follow a cache."""
        self.deepspeed.eval()
        return next_logits(self.deepspeed, tokens, cache)

    @torch.no_grad()
    def set_weights(self, weights: Weights) -> None:
        """Replace the initial weights before the first step, but for those of adapters. Every rank must call it.

        Each rank reads its own slices, one at a time. The fp32 master weights receive them unrounded, whatever the
        precision of the forward pass; a frozen weight has no master.
        """
        topology = self.topology
        for name, parameter in self.model.named_parameters():
            if is_adapter(name):
                continue
            part = weights.read(name, topology.tp_rank, topology.tp_size)
            value = padded_for(part, parameter).to(topology.device, torch.float32)
            set_whole(parameter, value)
            if not parameter.requires_grad:
                continue
            if hasattr(parameter, "ds_id"):
                size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
                padded = F.pad(value.flatten(), (0, size * topology.zero_size - value.numel()))
                safe_set_local_fp32_param(parameter, padded[size * topology.zero_rank :][:size])
            else:
                safe_set_full_fp32_param(parameter, value)

    def state_hash(self) -> StateHash:
        """Hash the fp32 weights that are trained, and their moments, as `weight_hash` does. Every rank must call it."""
        return state_hash(self.model, self.deepspeed.optimizer, self.topology)

    def save(self, folder: Path, take: Callable[[Path, object], None]) -> None:
        """Pass on the content of this rank's DeepSpeed files in `folder`/engine. Every rank must call it.

        Args:
            take: is called with each file's path and content, whose tensors are the live ones that training will
                change; must not raise, since the other ranks wait for this one.
        """
        self.deepspeed.checkpoint_engine = _CallbackCheckpointEngine(take)
        self.deepspeed.save_checkpoint(
            str(folder),
            tag="engine",
            client_state={"universal_checkpoint_info": self._universal_info},
            save_latest=False,  # the store decides which is newest, and DeepSpeed does not write that file atomically
            exclude_frozen_parameters=True,  # they are read from where they came from
        )

    def load(self, folder: Path) -> None:
        """Load weights and optimizer state from `folder`/engine, saved in the same layout. Every rank must call it.

        Raises:
            CheckpointError: if it is not a checkpoint of this model in this layout.
        """
        self._load(folder, universal=False)

    def load_universal(self, folder: Path) -> None:
        """Load both from a folder that `checkpoint.universal` made for this tp_size. Every rank must call it.

        Raises:
            CheckpointError: if it is not a checkpoint of this model.
        """
        topology, optimizer = self.topology, self.deepspeed.optimizer.optimizer
        under_muon = {id(weight) for group in self._groups if group["muon"] for weight in group["params"]}

        def read(weight: str, key: str, param: object) -> Tensor:
            if key == "exp_avg_sq" and id(param) in under_muon:
                return torch.empty(0)
            return read_piece(Path(weight) / f"{key}.pt", topology.zero_rank, topology.zero_size)

        # ZeRO-3 reads a weight's state with this; DeepSpeed's own function would read all of it on every rank.
        self.deepspeed.optimizer.load_hp_checkpoint_state = read
        self._load(folder / f"tp_{topology.tp_rank}", universal=True)
        for flat, state in optimizer.state.items():
            # The counter is updated in place, and DeepSpeed leaves one for all groups, on the CPU.
            state["step"] = torch.as_tensor(state["step"]).to(state["exp_avg"].device, torch.float32, copy=True)
            if isinstance(optimizer, Muon) and optimizer.has(flat):
                state.pop("exp_avg_sq", None)  # ZeRO-3 expects AdamW's moments of every weight, and made zeros
        optimizer.settle()
        self.average.load_universal(folder / f"tp_{topology.tp_rank}")

    def _load(self, folder: Path, universal: bool) -> None:
        self.deepspeed._config.load_universal_checkpoint = universal  # DeepSpeed reads it nowhere else
        try:
            path, _ = self.deepspeed.load_checkpoint(
                str(folder), tag="engine", load_lr_scheduler_states=False, custom_load_fn=load_trained
            )
        except (RuntimeError, KeyError, AssertionError, OSError) as error:
            raise CheckpointError(f"{folder / 'engine'} does not fit this model: {error}") from error
        if path is None:
            raise CheckpointError(f"{folder / 'engine'} has no DeepSpeed checkpoint for this topology")
        # Loading restores the old config's hyperparameters, but this config's apply.
        for group, own in zip(self.deepspeed.optimizer.param_groups, self._groups, strict=True):
            group["weight_decay"] = own["weight_decay"]
            group["betas"] = self.optim_config.betas
            group["eps"] = self.optim_config.eps
        self.deepspeed.optimizer.clip_grad = self.optim_config.grad_clip
        self.deepspeed.optimizer.optimizer.settle()
