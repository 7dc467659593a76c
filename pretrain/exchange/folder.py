"""Open a model's folder in whichever layout it is. {trainer, commands} -> folder -> {hf, meta, own}."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import xxhash

from pretrain.config_file import dump
from pretrain.exchange import hf, meta, own, run_model
from pretrain.exchange.description import computed_by, read_json
from pretrain.exchange.safetensors_folder import CONFIG
from pretrain.inference.generate import Codec, codec_of
from pretrain.model.architecture import ModelConfig
from shards import ConfigError, Tokenizer
from shards.storage.content_hash import hash_file

_logger = logging.getLogger(__name__)

Model = hf.HFModel | meta.MetaModel | own.OwnModel | run_model.RunModel


def open_model(folder: Path, expected: ModelConfig | None = None) -> Model:
    """Open the model in a folder of any layout, or in that of a run, of which RUN@STEP names a checkpoint.

    Args:
        expected: the config that it will be used with. If it has fewer tokens than the embedding has rows, which then
            pad it, the rows after them are not read.
    Raises:
        ConfigError: if there is no model that Headrace can run, or it differs from `expected`.
        CheckpointError: if the run has no such checkpoint.
    """
    model: Model
    if own.is_own(folder):
        model = own.OwnModel(folder, expected)
    elif (folder / CONFIG).exists():
        model = hf.HFModel(folder, expected)
    elif (folder / meta.PARAMS).exists():
        model = meta.MetaModel(folder, expected)
    elif run_model.is_run(folder):
        model = run_model.RunModel(folder, expected)
    else:
        raise ConfigError(
            f"{folder} holds no model: there is neither {CONFIG} (Hugging Face, or our own) nor {meta.PARAMS} (Meta)"
            " nor the config.yaml of a run"
        )
    if expected:
        model.description.check(expected)
        if left_out := model.description.config.vocab_size - expected.vocab_size:
            _logger.info(
                "%s: the last %d rows of its embedding have no token among model.vocab_size=%d, and are left out",
                folder, left_out, expected.vocab_size,
            )  # fmt: skip
    return model


def open_exported(folder: Path) -> Model:
    """Open the model in a folder that is no run's. Raises ConfigError if it is one, or as `open_model`."""
    model = open_model(folder)
    if isinstance(model, run_model.RunModel):
        raise ConfigError(
            f"--model {folder}: that is a run; name it with --run, and its checkpoint with --step or --steps"
        )
    return model


def pinned(path: Path, begun: Path | None = None) -> Path:
    """Return a path that goes on to name the same model: a run's with the step of its newest checkpoint.

    Args:
        begun: init_from of the run that is resumed, which keeps the checkpoint that it began with; None for a new run.
    """
    if begun is not None:
        return begun if run_model.is_checkpoint_of(begun, path) else path
    model = open_model(path)
    return model.path if isinstance(model, run_model.RunModel) else path


def describe(folder: Path) -> str:
    """Return a model's `model:` section as YAML. Raises ConfigError if Headrace cannot run the model."""
    values = computed_by(open_model(folder).description.config)
    return dump({"init_from": str(folder), "model": values})


def open_codec(folder: Path) -> Codec:
    """Open the tokenizer in a model's folder: a tokenizer.model of any kind, otherwise a tokenizer.json.

    Raises:
        ConfigError: if there is neither.
    """
    model, library = folder / "tokenizer.model", folder / "tokenizer.json"
    config = _read_if_there(folder / CONFIG)
    if model.exists():
        with contextlib.suppress(ConfigError):  # a file of a kind that cannot be read may have tokenizer.json beside it
            tokenizer = Tokenizer(model, bos=False, eos=False)
            return codec_of(tokenizer, bos=_begins_with_bos(tokenizer, config))
    if not library.exists():
        raise ConfigError(f"{folder} has neither a tokenizer.model that can be read nor a tokenizer.json")
    loaded = tokenizers.Tokenizer.from_file(str(library))
    # As transformers reads a prompt: of our own exports, the name of a special token in it is text
    loaded.encode_special_tokens = bool(_read_if_there(folder / "tokenizer_config.json").get("split_special_tokens"))
    return Codec(
        encode=lambda prompt: list(loaded.encode(prompt).ids),
        decode=lambda ids: str(loaded.decode(list(ids))),
        ends=frozenset(_ends(config)),
        size=max(loaded.get_vocab().values()) + 1,
    )


def open_tokenizer(folder: Path, path: Path | None = None) -> Tokenizer:
    """Open the tokenizer of a model's folder, with BOS and EOS around documents as the model was trained with them.

    A tokenizer.json often says only how a prompt begins. EOS is then the first that config.json names.

    Args:
        path: file of the tokenizer; None: the folder's tokenizer.model or tokenizer.json.
    Raises:
        ConfigError: if it cannot be read.
    """
    names = (folder / name for name in ("tokenizer.model", "tokenizer.json"))
    path = path or next((name for name in names if name.exists()), folder / "tokenizer.model")
    config, bare = _read_if_there(folder / CONFIG), Tokenizer(path, bos=False, eos=False)
    named = None if bare.eos_id >= 0 else next((bare.piece(index) for index in _ends(config)), None) or None
    return Tokenizer(path, _begins_with_bos(bare, config), bare.eos_id >= 0 or named is not None, eos_token=named)


def _read_if_there(path: Path) -> dict[str, Any]:
    """Return the content of a file, empty if there is none: Meta's layout has neither of those that are read here."""
    return read_json(path) if path.exists() else {}


def _begins_with_bos(tokenizer: Tokenizer, config: Mapping[str, Any]) -> bool:
    return tokenizer.bos_id >= 0 and config.get("bos_token_id", tokenizer.bos_id) is not None


def _ends(config: Mapping[str, Any]) -> list[int]:
    """Return the ids that end a document, as config.json lists them."""
    ends = config.get("eos_token_id")
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def file_hashes(model: Model, part: int = 0, parts: int = 1) -> list[str]:
    """Return "name hash" for each file in one part of a model's files. Raises CheckpointError if a run's is damaged."""
    if isinstance(model, run_model.RunModel):
        return model.file_hashes(part, parts)
    files = sorted(path for path in model.description.file.parent.iterdir() if path.is_file())
    return [f"{path.name} {hash_file(path)}" for path in files[part::parts]]


def content_hash(hashes: Sequence[str]) -> str:
    """Return 32 hex digits for all files of a model, given the results of `file_hashes` for each part."""
    return xxhash.xxh3_128_hexdigest("\n".join(sorted(hashes)).encode())
