"""The memory that is free: the host's, and what each control group around a process has left of its limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.host_memory import available_memory

FREE = 8_000_000  # kB


def write_group(folder: Path, limit: str, used: int, inactive_file: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 7\nfile 999999\ninactive_file {inactive_file}\nactive_file 5\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Make a host's files, where this process is in the control group /job/step."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 9000000 kB\nMemAvailable: {FREE} kB\nHugePages_Total: 0\n")
    (tmp_path / "proc/self/cgroup").write_text("1:name=systemd:/elsewhere\n0::/job/step\n")
    return tmp_path


def test_the_tightest_of_all_groups_counts_by_what_is_left_of_its_limit(root: Path) -> None:
    groups = root / "sys/fs/cgroup"
    assert available_memory(root) == FREE * 1024, "no groups at all"
    write_group(groups / "job/step", "max", 10**9, 0)
    write_group(groups / "elsewhere", "1", 0, 0)
    assert available_memory(root) == FREE * 1024, "neither its own nor one above has a limit"
    write_group(groups / "job", str(6 * 10**9), 5 * 10**9, 3 * 10**9)
    assert available_memory(root) == 4 * 10**9
    write_group(groups / "job/step", str(5 * 10**9), 2 * 10**9, 0)
    assert available_memory(root) == 3 * 10**9
    write_group(groups, str(2 * 10**9), 10**9, 0)  # as a container sees its own
    assert available_memory(root) == 10**9
    write_group(groups, str(2 * 10**9), 3 * 10**9, 0)
    assert available_memory(root) == 0


def test_it_is_unknown_where_the_host_does_not_say(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
