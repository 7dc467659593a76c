"""Write down what an audit compared and found, to be published with a model. comparison -> certificate -> JSON."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import msgspec

from pretrain.audit.comparison import Comparison
from pretrain.audit.interval import Training
from pretrain.audit.replay import Replay
from pretrain.audit.verdict import verdict
from pretrain.run.events import now
from pretrain.run.run_folder import RunFolder
from pretrain.run.starts import StartRecord
from shards import ConfigError
from shards.fingerprint import without_paths
from shards.storage.atomic import write_atomically

_FORMAT = "headrace-audit-1"


def certificate(training: Training, replay: Replay, comparison: Comparison) -> dict[str, object]:
    """Return the content of a certificate: all that was compared, and how; it names no hosts and no paths."""
    recorded, found, tolerances = comparison.recorded, comparison.found, comparison.tolerances
    return {
        "format": _FORMAT,
        "date": now(),
        "run": training.recorded[0].run.name,
        "agrees": comparison.agrees,
        "verdict": verdict(comparison),
        "from_step": recorded.before.step,
        "steps": len(recorded.steps),
        "compared": "bit for bit" if tolerances is None else "within tolerances",
        "obstacles": comparison.obstacles,
        "tolerances": {
            figure: [tolerance.at(index) for index in (0, len(recorded.steps) - 1)]  # at the first and the last step
            for figure, tolerance in (tolerances or {}).items()
        },
        "largest_deviations": comparison.deviations,
        "differences": [difference._asdict() for difference in comparison.differences],
        "config_hash": training.recorded[0].hash(),
        "data_hash": _hash(replay.fingerprint),
        "trained_with": [_described(start) for start in training.starts],
        "audited_with": _described(replay.start),
        "recorded": [recorded.before, *recorded.steps],
        "found": [found.before, *found.steps],
    }


def check_place(path: Path, folder: RunFolder) -> None:
    """Check, before anything is trained, that a certificate can be written. Raises ConfigError if it cannot."""
    if not path.parent.is_dir():
        raise ConfigError(f"--certificate {path}: {path.parent} is no folder; make it first")
    if path.resolve().is_relative_to(folder.root.resolve()):
        raise ConfigError(
            f"--certificate {path} lies in the run's folder, in which an audit changes nothing; name another place"
        )


def write(path: Path, content: Mapping[str, object]) -> None:
    """Write a certificate, in place of an older one."""
    write_atomically(path, msgspec.json.format(msgspec.json.encode(content)) + b"\n")


def _described(start: StartRecord) -> dict[str, object]:
    return {
        "program": start.program,
        "commit": start.commit,
        "layout": str(start.layout),
        **msgspec.to_builtins(start.environment),
    }


def _hash(fingerprint: Mapping[str, object]) -> str:
    """Return the SHA-256 of the data's fingerprint as canonical JSON, 64 hex digits, without the shards' paths."""
    plain = msgspec.json.encode(without_paths(fingerprint), order="sorted")
    return hashlib.sha256(plain).hexdigest()
