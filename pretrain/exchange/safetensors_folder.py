"""A model's weights as the safetensors files of a folder, read lazily and written as a stream.

{hf, own} -> safetensors_folder -> safetensors_file. Several files have an index that says which weight is in which, as
in Hugging Face's layout.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.exchange.description import write_json
from pretrain.exchange.safetensors_file import write_safetensors
from pretrain.model.architecture import WeightSpec
from pretrain.model.weights import Weights
from shards import ConfigError

CONFIG, SINGLE = "config.json", "model.safetensors"
_INDEX = "model.safetensors.index.json"
_NOTHING = re.compile(r"(?!)")


class StoredWeights:
    """The weights in a folder; only the requested slices are read, on request.

    Args:
        stored: what its config.json implies, by our names.
        wanted: what is read of it; of an embedding that may be fewer rows.
        names: our names -> those in the files.
        ignored: matches names of tensors that are no weights.
    Raises:
        ConfigError: if there are other weights, or some are missing.
    """

    def __init__(
        self,
        folder: Path,
        stored: Mapping[str, WeightSpec],
        wanted: Mapping[str, WeightSpec],
        names: Mapping[str, str],
        ignored: re.Pattern[str] = _NOTHING,
    ) -> None:
        self._stored, self._wanted, self._names = stored, wanted, names
        self._files = _files_in(folder)
        unknown = sorted(name for name in self._files.keys() - set(names.values()) if not ignored.fullmatch(name))
        if unknown:
            raise ConfigError(f"{folder} has weights of another architecture: {_listed(unknown)}")
        if missing := sorted(set(names.values()) - self._files.keys()):
            raise ConfigError(f"{folder} lacks weights: {_listed(missing)}")

    def read(self, name: str, index: int = 0, count: int = 1) -> Tensor:
        """Read a weight, or its slice for tensor-parallel rank `index` of `count`, in the file's type."""
        theirs = self._names[name]
        with _open_safetensors(self._files[theirs]) as file:
            stored = file.get_slice(theirs)
            if tuple(stored.get_shape()) != self._stored[name].shape:
                raise ConfigError(
                    f"{self._files[theirs]}: {theirs} has the shape {stored.get_shape()}, but {CONFIG} implies"
                    f" {list(self._stored[name].shape)}"
                )
            part: Tensor = stored[self._wanted[name].bounds(index, count)]
            return part


def _files_in(folder: Path) -> dict[str, Path]:
    """Map the name of each tensor in a folder to the file that holds it."""
    index, single = folder / _INDEX, folder / SINGLE
    if index.exists():
        try:
            names = json.loads(index.read_text())["weight_map"]
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{index}: cannot be read as an index of weights: {error!r}") from None
        return {name: folder / file for name, file in names.items()}
    if single.exists():
        with _open_safetensors(single) as file:
            return dict.fromkeys(file.keys(), single)
    raise ConfigError(f"{folder} has neither {SINGLE} nor {_INDEX}; no other weight formats are supported")


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: cannot be read as safetensors: {error}") from None


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def write_weights(
    folder: Path,
    weights: Weights,
    specs: Mapping[str, WeightSpec],
    names: Mapping[str, str],
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    """Write the weights, as several files with an index if they exceed `max_shard_bytes`.

    Args:
        names: our names -> those in the files.
    """
    ours = {names[name]: name for name in specs}
    shapes = {theirs: specs[name].shape for theirs, name in ours.items()}
    parts = list(_parts(shapes, dtype.itemsize, max_shard_bytes))
    places: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file = SINGLE if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_safetensors(folder / file, part, dtype, lambda theirs: weights.read(ours[theirs]))
        places |= dict.fromkeys(part, file)
    if len(parts) > 1:
        total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(folder / _INDEX, index)


def _parts(
    shapes: Mapping[str, tuple[int, ...]], item_bytes: int, max_bytes: int
) -> Iterator[dict[str, tuple[int, ...]]]:
    part: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in shapes.items():
        bytes_ = math.prod(shape) * item_bytes
        if part and size + bytes_ > max_bytes:
            yield part
            part, size = {}, 0
        part[name] = shape
        size += bytes_
    yield part
