"""Measure each step and make its record. engine, feed -> recorder -> journal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from pretrain.checkpoint.state_hash import StateHash
from pretrain.faults.stragglers import RankSeconds, Straggler
from pretrain.feed import StepBatch
from pretrain.gradient_noise import NoiseScale
from pretrain.model.architecture import ModelConfig
from pretrain.model.size import flops_of_documents, flops_per_token
from pretrain.run.metrics import StepRecord, device_meter, mfu, peak_memory_bytes
from pretrain.stepper import Step
from pretrain.topology import Topology
from shards import Stage


class StepRecorder:
    """Makes the records of metrics.jsonl.

    Args:
        model: the model's config, which determines the arithmetic per token.
        stages: all stages of the run.
        with_z_loss: whether the training loss includes a z-loss.
        peak_flops: FLOP/s of all devices together; None if unknown.
        noise_scale: knows the last steps.
    Attributes:
        meter: times the parts of the current step.
        seconds: what this rank did in the last step, without its loading, which `feed` times.
    """

    def __init__(
        self,
        model: ModelConfig,
        stages: Sequence[Stage],
        with_z_loss: bool,
        peak_flops: float | None,
        topology: Topology,
        noise_scale: NoiseScale,
    ) -> None:
        self.meter = device_meter(topology.device)
        self._model, self._stages = model, stages
        self._flops_per_token = [flops_per_token(model, stage.data.seq_len) for stage in stages]
        self._decontaminates = any(stage.data.decontaminate is not None for stage in stages)
        self._has_prompts = any(not source.learns_prompts for stage in stages for source in stage.data.sources)
        self._with_z_loss = with_z_loss
        self._peak_flops = peak_flops
        self._device = topology.device
        self._noise_scale = noise_scale
        self._saving_seconds: float | None = None  # since the last step
        self.seconds = RankSeconds()

    def note_save(self, seconds: float) -> None:
        """Record how long training was paused for a save, for the next step's record."""
        self._saving_seconds = seconds

    def record(
        self,
        made: Step,
        batch: StepBatch,
        failed_saves: int,
        straggler: Straggler | None,
        hashes: StateHash | None = None,
    ) -> StepRecord:
        """Make the record of a step that has just ended.

        Args:
            failed_saves: number of failed saves in a row, up to now.
            straggler: the rank that holds the others up, if one does.
            hashes: of weights and moments after the step, if they are due.
        """
        state, stats = made.state, made.stats
        seconds = self.meter.end_step()
        self.seconds = _of_this_rank(seconds)
        saving_seconds, self._saving_seconds = self._saving_seconds, None
        tokens_per_second = batch.n_tokens / seconds["step"]
        n_tokens = max(1, batch.n_tokens)  # 0 if all documents of a batch are forgotten
        noise = None if made.spike else stats.noise  # one explosion would outweigh all other steps
        flops_in_documents = flops_of_documents(self._model, batch.n_tokens, batch.squared_lengths) / n_tokens
        return StepRecord(
            step=state.step,
            loss=stats.loss,
            nonfinite=True if batch.n_targets and not (stats.applied or stats.refused or made.passed_over) else None,
            spike=made.spike or None,
            skipped_update=stats.refused or None,
            straggler=straggler.rank if straggler else None,
            straggler_seconds=straggler.seconds if straggler else None,
            without_targets=None if batch.n_targets else True,
            targets=batch.n_targets if self._has_prompts else None,
            trained_hash=state.trained_hash or None,
            forgotten_tokens=batch.n_forgotten or None,
            passed_over=made.passed_over or None,
            stage=batch.stage if len(self._stages) > 1 else None,
            failed_saves=failed_saves or None,
            checkpoint_seconds=saving_seconds,
            z_loss=stats.z_loss if self._with_z_loss else None,
            grad_norm=stats.grad_norm,
            noise_scale=self._noise_scale.note(state.step, noise),
            gradient_signal=noise.signal if noise else None,
            gradient_variance=noise.variance if noise else None,
            learning_rate=made.learning_rate,
            tokens=state.tokens,
            tokens_per_second=tokens_per_second,
            batch_hash=state.batch_hash,
            step_seconds=seconds["step"],
            data_wait_seconds=seconds["data_wait"],
            forward_backward_seconds=seconds.get("forward_backward", 0.0),
            optimizer_seconds=seconds.get("optimizer", 0.0),
            peak_memory_bytes=peak_memory_bytes(self._device),
            padding_share=batch.n_padding / (batch.n_padding + batch.n_tokens + batch.n_forgotten),
            tokens_per_source=batch.tokens_per_source,
            epoch_per_source=batch.epoch_per_source,
            skipped_records=batch.skipped_so_far,
            replayed_entries=batch.replays,
            contaminated_per_source=_contaminated(batch) if self._decontaminates else None,
            weight_hash=hashes.weights if hashes else None,
            optimizer_hash=hashes.optimizer if hashes else None,
            mfu=mfu(self._flops_per_token[batch.stage], tokens_per_second, self._peak_flops),
            mfu_documents=mfu(flops_in_documents, tokens_per_second, self._peak_flops),
        )


def _of_this_rank(seconds: Mapping[str, float]) -> RankSeconds:
    """Return what this rank did in a step, given the meter's parts, without the loading."""
    forward, both = seconds.get("forward", 0.0), seconds.get("forward_backward", 0.0)
    in_forward, in_backward = (seconds.get(f"{phase}_communication", 0.0) for phase in ("forward", "backward"))
    return RankSeconds(0.0, forward - in_forward, both - forward - in_backward, in_forward + in_backward)


def _contaminated(batch: StepBatch) -> dict[str, int]:
    counts = Counter(record.source for record in batch.contaminated)
    return {source: counts[source] for source in batch.epoch_per_source}
