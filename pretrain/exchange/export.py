"""Export a run's model as a folder. commands.export -> export -> {hf, meta, own, peft, tokenizer_files}.

The folder appears at the end, complete, or not at all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pretrain.exchange import hf, meta, own, peft
from pretrain.exchange.tokenizer_files import is_json, write_tokenizer
from pretrain.model.architecture import Layout, ModelConfig
from pretrain.model.transformer import LlamaConfig
from pretrain.model.weights import Weights, check_splits, trained_specs, weight_specs
from shards import ConfigError, DataConfig, Tokenizer
from shards.storage.atomic import fsync_folder, is_there, partial_name

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export(
    weights: Weights,
    model: ModelConfig,
    data: DataConfig,
    to: Path,
    layout: Layout | None = None,
    dtype: torch.dtype = torch.float32,
    tp_size: int = 1,
    max_shard_bytes: int = 5 * 10**9,
) -> Layout:
    """Write a model and its tokenizer into a new folder.

    Args:
        weights: read one at a time.
        data: the data config, with the tokenizer and seq_len of the training.
        layout: None: the first that the architecture has.
        dtype: type to round the weights to.
        tp_size: number of files in Meta's layout.
        max_shard_bytes: maximum file size in the other layouts.
    Returns:
        The layout.
    Raises:
        ConfigError: if the folder exists already, or the layout cannot represent this model.
    """
    layout = layout or model.LAYOUTS[0]
    if layout not in model.LAYOUTS:
        raise ConfigError(
            f"--format {layout}: no program that reads that layout has model.architecture={model.architecture}; choose"
            f" {' or '.join(model.LAYOUTS)}"
        )
    tokenizer = Tokenizer.of(data)
    ids = {
        "bos_token_id": tokenizer.bos_id if data.bos else None,  # a prompt begins as training documents did
        "eos_token_id": tokenizer.eos_id if tokenizer.eos_id >= 0 else None,
    }
    with _atomic_folder(to) as folder:
        if layout == "headrace":
            write_tokenizer(tokenizer, folder, data.bos, data.seq_len)
            own.write_model(folder, weights, model, data.seq_len, ids, dtype, max_shard_bytes)
            return layout
        assert isinstance(model, LlamaConfig), "no other has these layouts"
        specs = weight_specs(model.model_copy(update={"vocab_multiple": 1}))  # no other program has padding
        if layout == "meta":
            _check_meta_splits(model, tp_size)
            meta.write_params(folder, model)
            name = "tokenizer.json" if is_json(data.tokenizer) else "tokenizer.model"
            shutil.copyfile(data.tokenizer, folder / name)
            meta.write_weights(folder, weights, specs, model.head_dim, dtype, tp_size)
        else:
            hf.write_config(folder, model, data.seq_len, dtype, ids)
            write_tokenizer(tokenizer, folder, data.bos, data.seq_len)
            hf.write_weights(folder, weights, specs, dtype, max_shard_bytes)
    return layout


def _check_meta_splits(model: ModelConfig, tp_size: int) -> None:
    check_splits(model, tp_size, "--tp")
    if model.vocab_size % tp_size:
        raise ConfigError(
            f"--tp={tp_size} does not divide the model's vocab_size={model.vocab_size}, and Meta's files have"
            " no padding; choose a divisor, such as --tp 1"
        )


def export_adapters(weights: Weights, model: ModelConfig, base: str, to: Path, dtype: torch.dtype) -> None:
    """Write a model's adapters into a new folder, as `peft` loads them.

    Args:
        weights: of the adapters, read one at a time.
        model: with the adapters.
        base: the model that they were trained on, by its folder or name.
        dtype: type to round the weights to.
    Raises:
        ConfigError: if the folder exists already.
    """
    with _atomic_folder(to) as folder:
        peft.write_config(folder, model, base)
        peft.write_weights(folder, weights, trained_specs(model), dtype)


@contextmanager
def _atomic_folder(to: Path) -> Iterator[Path]:
    """Yield a folder beside `to` that is renamed to it once it is complete and on disk."""
    if is_there(to):
        raise ConfigError(f"--to {to} exists already; name another folder, or remove it")
    partial = partial_name(to)
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
