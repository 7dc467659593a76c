"""Files are written whole or not at all, and a hash is that of the content."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import xxhash

from shards.storage import content_hash
from shards.storage.atomic import write_atomically
from shards.storage.content_hash import hash_file

WRITER = """
import sys; from pathlib import Path; from shards.storage.atomic import write_atomically
path = Path(sys.argv[1]); n = 0
while True: write_atomically(path, str(n % 10) * 300_000); n += 1
"""


def test_a_killed_write_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "state"
    for i in range(3):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
        while not path.exists():
            time.sleep(0.01)
        time.sleep(0.2 + 0.013 * i)
        process.send_signal(signal.SIGKILL)
        process.wait()
        content = path.read_text()
        assert len(content) == 300_000
        assert len(set(content)) == 1


def test_a_failed_write_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    with pytest.raises(OSError):  # noqa: PT011 - which one depends on the file system
        write_atomically(tmp_path / "state", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content_hash, "READ_BYTES", 1000)
    for content in (b"", b"x" * 999, bytes(range(256)) * 99):
        write_atomically(tmp_path / "file", content)
        assert hash_file(tmp_path / "file") == xxhash.xxh3_128_hexdigest(content)
