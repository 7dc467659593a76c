"""A model in the folder of a run of ours, as initial weights for another run. {checkpoint, run_folder} -> run_model."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from pretrain.checkpoint.state import read_data
from pretrain.checkpoint.store import CheckpointConfig, CheckpointStore
from pretrain.checkpoint.weights import CheckpointWeights
from pretrain.config_file import read_tree
from pretrain.exchange.description import ModelDescription, read_specs
from pretrain.model.architecture import ModelConfig
from pretrain.model.weights import weight_specs
from pretrain.run.run_folder import RunFolder
from pretrain.stages import recorded_stages, stage_of
from shards import CheckpointError, ConfigError

_AT_STEP = re.compile(r"(.+)@(\d+)")


class RunModel:
    """The model of a run's checkpoint.

    Args:
        path: the run's folder, followed by @STEP unless the newest checkpoint is meant.
        expected: the config of the model that is to begin with its weights; None: the run's own.
    Attributes:
        tokenizer: the file that the run's config names.
        tokenizer_hash: hash of that file's content when the run read it.
        optimizer: optim.name of the run.
    Raises:
        ConfigError: if the run's config cannot be read.
        CheckpointError: if there is no such checkpoint.
    """

    def __init__(self, path: Path, expected: ModelConfig | None = None) -> None:
        root, step = _split(path)
        folder = RunFolder(root)
        self.checkpoint = CheckpointStore(folder.checkpoints, CheckpointConfig()).find(step)
        file = folder.config
        tree = read_tree(file)[0]
        stage = stage_of(self.checkpoint.step, recorded_stages(tree, str(file)))
        config = stage.model
        if config.adapters:
            raise ConfigError(f"init_from={path}: the run trains adapters; export it, which adds them to its model")
        keys = {key: f"model.{key}" for key in config.model_dump()}
        self.description = ModelDescription(file, config, keys, stage.data.seq_len)
        self.specs = read_specs(config, expected)
        self.tokenizer = stage.data.tokenizer
        self.tokenizer_hash = str(read_data(self.checkpoint).fingerprint["tokenizer"])
        self.optimizer = str(tree.get("optim", {}).get("name", "adamw"))
        self._weights = CheckpointWeights(self.checkpoint, weight_specs(config))

    @property
    def path(self) -> Path:
        """Return the path that names this very checkpoint, also once the run has newer ones."""
        root = self.checkpoint.folder.parents[1]
        return root.with_name(f"{root.name}@{self.checkpoint.step}")

    def file_hashes(self, part: int = 0, parts: int = 1) -> list[str]:
        """Return "name hash" for each file in one part of the checkpoint's files.

        Raises:
            CheckpointError: if any of them is damaged.
        """
        if broken := self.checkpoint.broken_files(part, parts):
            raise CheckpointError("; ".join(broken))
        return [f"{file.name} {file.hash}" for file in self.checkpoint.files[part::parts]]

    def read(self, name: str, index: int = 0, count: int = 1) -> Tensor:
        """Read a weight, or its slice for tensor-parallel rank `index` of `count`, in fp32."""
        return self._weights.read(name)[self.specs[name].bounds(index, count)]  # the padding of its own is left out

    def check_optimizer(self, optimizer: str, model: ModelConfig) -> None:
        """Check that a run with this optimizer and model can go on with the state of the optimizer.

        Raises:
            ConfigError: naming what differs.
        """
        if optimizer != self.optimizer:
            raise ConfigError(
                f"init_optimizer: {self.description.file} says optim.name={self.optimizer}, and the state of one"
                f" optimizer means nothing to another; set optim.name={self.optimizer}, or leave init_optimizer out"
            )
        for key in ("vocab_size", "vocab_multiple"):
            theirs, ours = (getattr(config, key) for config in (self.description.config, model))
            if theirs != ours:
                raise ConfigError(
                    f"init_optimizer: {self.description.file} says model.{key}={theirs}, not {ours}, so the optimizer's"
                    f" state has other rows; set model.{key}={theirs}, or leave init_optimizer out"
                )


def is_run(path: Path) -> bool:
    """Return whether a path names a run, or one of its checkpoints."""
    return RunFolder(_split(path)[0]).config.exists()


def is_checkpoint_of(path: Path, run: Path) -> bool:
    """Return whether a path names a checkpoint, by its step, of the run in a folder."""
    match = _AT_STEP.fullmatch(path.name)
    return match is not None and path.with_name(match[1]) == run


def _split(path: Path) -> tuple[Path, int | None]:
    """Return the folder and the step of RUN@STEP; of a folder that exists under the whole name, the newest."""
    match = _AT_STEP.fullmatch(path.name)
    if match is None or path.exists():
        return path, None
    return path.with_name(match[1]), int(match[2])
