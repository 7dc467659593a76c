"""The config of a tiny run on the bundled text, for tests of whole runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

PEAK_RATE = 3e-3


def write_config(folder: Path, name: str, **changes: object) -> Path:
    """Write a config to FOLDER/config.yaml and return its path; the run's folder is FOLDER/NAME.

    Args:
        changes: sections; the keys in a section replace those of the tiny run's.
    """
    sections: dict[str, Any] = {
        "run": {"name": name, "dir": str(folder), "seed": 7},
        "model": {
            "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 64, "vocab_size": 4096,
            "tie_embeddings": True,
        },
        "data": {
            "seq_len": 64,
            "lanes": 8,
            "window_bytes": 1 << 16,
            "prefetch_bytes": 1 << 16,
            "num_workers": 0,
            "tokenizer": "shards/sample/tokenizer-4k.model",
            "index_dir": str(folder / "index"),
            "sources": [{"name": "pile", "paths": ["shards/sample/train/pile-*"]}],
        },
        "train": {"steps": 3, "global_batch_size": 8, "micro_batch_size": 2},
        "optim": {"learning_rate": PEAK_RATE, "schedule": "constant"},
        "precision": "fp32",
        "checkpoint": {"every": 1000, "keep": 2},
        "evaluation": {"suite": None},
        "wandb": {"mode": "disabled"},
    }  # fmt: skip
    for section, change in changes.items():
        sections[section] = sections.get(section, {}) | change if isinstance(change, Mapping) else change
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path
