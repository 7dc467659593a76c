"""Documents encoded one by one, joined in one array. {sentencepiece_model, library_model} -> joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from shards.arrays import Ints


def encode_each(
    texts: Sequence[str],
    encode: Callable[[str], npt.NDArray[np.integer]],
    prefix: Sequence[int],
    suffix: Sequence[int],
    dtype: npt.DTypeLike,
) -> tuple[npt.NDArray[np.integer], Ints]:
    """Encode each text on its own: all ids in one array of `dtype`, and int64 [texts], the number of each.

    Args:
        prefix, suffix: ids before and after each text.
    """
    before, after = np.array(prefix, dtype), np.array(suffix, dtype)
    parts: list[npt.NDArray[np.integer]] = [np.zeros(0, dtype)]
    for text in texts:
        parts += (before, encode(text).astype(dtype), after)
    ends = np.cumsum([0, *map(len, parts[1:])])[::3]
    return np.concatenate(parts), np.diff(ends)
