"""A run's model as a folder that other programs read, and such folders as models. commands -> export -> {hf, meta}.

The folder appears at the end, whole, or not at all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from pretrain.exchange import hf, meta
from pretrain.exchange.foreign import architecture
from pretrain.exchange.tokenizer_files import write_tokenizer
from pretrain.model.transformer import ModelConfig
from pretrain.model.weights import Weights, weight_specs
from pretrain.yaml_tree import dump
from shards import ConfigError, DataConfig, Tokenizer
from shards.durable import fsync_folder

Format = Literal["hf", "meta"]
Model = hf.HFModel | meta.MetaModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def open_model(folder: Path, expected: ModelConfig | None = None) -> Model:
    """The model in a folder, of whichever layout it has.

    Args:
        expected: the config that it is to be used with.
    Raises:
        ConfigError: if there is no model that ours can be, or it differs from `expected`.
    """
    model: Model
    if (folder / hf.CONFIG).exists():
        model = hf.HFModel(folder)
    elif (folder / meta.PARAMS).exists():
        model = meta.MetaModel(folder, expected.rope_scaling if expected else None)
    else:
        raise ConfigError(
            f"{folder} holds no model: there is neither {hf.CONFIG} (Hugging Face) nor {meta.PARAMS} (Meta)"
        )
    if expected:
        model.description.check(expected)
    return model


def describe(folder: Path) -> str:
    """A model's `model:` section for a run's config, as YAML. Raises: ConfigError if ours cannot be this model."""
    values = architecture(open_model(folder).description.config)
    return dump({"init_from": str(folder), "model": values})


def export(
    weights: Weights,
    model: ModelConfig,
    data: DataConfig,
    to: Path,
    layout: Format = "hf",
    dtype: torch.dtype = torch.float32,
    tp_size: int = 1,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a model and its tokenizer into a new folder.

    Args:
        weights: where they are read from, one at a time.
        data: whose tokenizer and seq_len the model was trained with.
        dtype: what the weights are rounded to.
        tp_size: of Meta's layout: how many files.
        max_shard_bytes: of Hugging Face's: how large a file may be.
    Raises:
        ConfigError: if the folder is there already, or the layout cannot hold this model.
    """
    specs = weight_specs(model)
    tokenizer = Tokenizer(data.tokenizer, data.bos, data.eos)
    with _appearing(to) as folder:
        if layout == "meta":
            _check_splits(model, tp_size)
            meta.write_params(folder, model)
            shutil.copyfile(data.tokenizer, folder / "tokenizer.model")
            meta.write_weights(folder, weights, specs, model.head_dim, dtype, tp_size)
        else:
            ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
            present = {key: index for key, index in ids.items() if index >= 0}
            hf.write_config(folder, model, data.seq_len, dtype, present)
            write_tokenizer(data.tokenizer, folder, data.bos, data.seq_len)
            hf.write_weights(folder, weights, specs, dtype, max_shard_bytes)


def _check_splits(model: ModelConfig, tp_size: int) -> None:
    for key, value in (
        ("n_heads", model.n_heads), ("n_kv_heads", model.kv_heads), ("vocab_size", model.vocab_size),
        ("ffn_dim", model.hidden_dim),
    ):  # fmt: skip
        if value % tp_size:
            raise ConfigError(f"--tp {tp_size} does not divide model.{key}={value}")


@contextmanager
def _appearing(to: Path) -> Iterator[Path]:
    """A folder beside `to` that gets its name once it is complete and durable."""
    if to.exists():
        raise ConfigError(f"--to {to} is there already; name another folder, or remove it")
    partial = to.with_name(f".{to.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        fsync_folder(partial)
        partial.rename(to)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    fsync_folder(to.parent)
