"""Runs begun under an older plan version continue under it: their batches never change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import xxhash
import yaml

from shards import ConfigError, DataConfig, Loader, check_fingerprint
from tests.shards.corpora import ROOT, config, write_three_sources

SEED = 5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write three sources of unlike shards: many short, few long, one with blank lines."""
    return write_three_sources(tmp_path_factory.mktemp("corpus"), [".jsonl"], max_frames=1)


def of(corpus: Path, weights: tuple[float, ...], epochs: tuple[int | None, ...], **changes: object) -> DataConfig:
    sources = [
        {"name": name, "paths": [str(corpus / f"{name}-*")], "weight": weight, "max_epochs": passes}
        for name, weight, passes in zip("abc", weights, epochs, strict=True)
    ]
    return config(sources, plan_version=1, **changes)


def chained(loader: Loader, batches: int) -> tuple[int, str]:
    """Count the batches, up to `batches`, and return the hash of all their rows."""
    chain, count = "", 0
    for batch in loader:
        chain = xxhash.xxh3_64_hexdigest(f"{chain}/{batch.row_hash:016x}".encode())
        count += 1
        if count == batches:
            break
    return count, chain


UNLIMITED = (None, None, None)
# Weights, passes, other keys, rows per batch, batches, and the hash under the program that preceded version 2
CASES = {
    "best_fit": ((0.5, 0.3, 0.2), UNLIMITED, {"lanes": 4}, 8, 40, "59cdf0611a7a7b96"),
    "weights change": (
        (0.5, 0.3, 0.2),
        UNLIMITED,
        {"lanes": 6, "packing": "concat", "weight_changes": [{"step": 7, "weights": {"a": 0.0, "c": 1.0}}]},
        12,
        30,
        "41a302adc6190bad",
    ),
    "a source runs out": (
        (0.5, 0.3, 0.2),
        (1, None, None),
        {"lanes": 2, "packing": "truncate"},
        2,
        300,
        "a0df4cc22293b2fe",
    ),
    "default lanes": (
        (0.1, 0.1, 0.8),
        UNLIMITED,
        {"packing": "pad", "window_bytes": 512},
        24,
        20,
        "a6ef2c60858d9ad0",
    ),
    "a weight too small": ((1e-6, 0.7, 0.3), UNLIMITED, {"lanes": 12}, 12, 40, "c792cc02021d1fb6"),
    # At batch 1,311 the first lane was empty, and the run ended there
    "several epochs": ((1.0, 1.0, 1.0), (2, 2, 2), {"lanes": 3, "window_bytes": 1024}, 6, 1311, "8a8c2e50789966a8"),
}

# The state that the program before version 2 saved after 60 batches
STATE = """{"version": 1, "rows": 240, "num_lanes": 2, "source_names": ["a", "b", "c"], "lanes": {
    "0": {"rows": 120, "mixing_rows": 120, "sources": [[60, 1, 0, 46, 0], [36, 0, 0, 36, 0], [24, 0, 0, 24, 0]]},
    "1": {"rows": 120, "mixing_rows": 120, "sources": [[60, 1, 0, 9, 0], [36, 0, 0, 36, 0], [24, 0, 0, 24, 0]]}}}"""


@pytest.mark.parametrize("case", CASES)
def test_batches_of_version_1_are_those_of_the_old_program(corpus: Path, case: str) -> None:
    weights, epochs, changes, rows, batches, expected = CASES[case]
    with Loader(of(corpus, weights, epochs, **changes), rows, SEED) as loader:
        assert chained(loader, batches) == (batches, expected)


def test_a_state_of_version_1_continues_as_in_the_old_program(corpus: Path) -> None:
    with Loader(of(corpus, (0.5, 0.3, 0.2), (1, None, None), lanes=2), 4, SEED) as loader:
        assert chained(loader, 60) == (60, "f7b29194f8323898")
        state = json.loads(json.dumps(loader.state_dict()))
        for lane in state["lanes"].values():  # the rows of the window, which the old program did not save
            lane["sources"] = [cursor[:5] for cursor in lane["sources"]]
        assert state == json.loads(STATE)
        loader.load_state_dict(json.loads(STATE))
        assert chained(loader, 40) == (40, "42c557d259e0ab04")


def test_a_fingerprint_without_a_version_has_version_1(corpus: Path) -> None:
    def fingerprint(version: int | None) -> dict[str, object]:
        data = of(corpus, (0.5, 0.3, 0.2), UNLIMITED, lanes=2).model_copy(update={"plan_version": version})
        with Loader(data, 4) as loader:
            return json.loads(json.dumps(loader.fingerprint))

    old = fingerprint(1)
    del old["config"]["plan_version"]
    check_fingerprint(old, fingerprint(1))
    with pytest.raises(ConfigError, match=r"begun with data\.plan_version=1, now it is 2; set data\.plan_version=1"):
        check_fingerprint(old, fingerprint(None))
    check_fingerprint(fingerprint(2), fingerprint(None))


def test_the_quickstart_reads_the_batches_it_always_read(tmp_path: Path) -> None:
    """The hash is that of step 50 in metrics.jsonl of a run by the program that brought in plan version 2."""
    settings = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    data = settings["data"] | {"index_dir": str(tmp_path), "num_workers": 0}
    data["tokenizer"] = str(ROOT / data["tokenizer"])
    data["sources"] = [source | {"paths": [str(ROOT / path) for path in source["paths"]]} for source in data["sources"]]
    with Loader(DataConfig.model_validate(data), settings["train"]["global_batch_size"]) as loader:
        assert chained(loader, 50) == (50, "3e2433003e282e9f")
