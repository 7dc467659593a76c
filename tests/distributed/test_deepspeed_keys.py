"""The DeepSpeed keys that a config may set change no figure and no file; see the module that the ranks run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks


@pytest.mark.distributed
def test_allowed_keys_change_neither_figures_nor_files(tmp_path: Path) -> None:
    run_ranks(2, "tests.distributed.deepspeed_keys", str(tmp_path))
