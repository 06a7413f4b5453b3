"""Threads are those that can run: cores of the affinity, and the quota of every group around the process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from linspec.bench.library import info
from linspec.bench.machine import set_threads
from linspec.kernels.cpu import threads
from linspec.utils import cores
from linspec.utils.cores import cpu_quota, usable_threads
from linspec.utils.ram import available_bytes

V2 = "40 31 0:41 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "32 31 0:29 {top} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"


def tree(root: Path, groups: str, mounts: str, files: dict[str, str]) -> Path:
    """A file system with these groups, mounts and files of groups."""
    own = {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts}
    for name, text in (own | {f"sys/fs/cgroup/{n}": t for n, t in files.items()}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"a/b/cpu.max": "200000 100000"}, 2.0),
        ({"a/b/cpu.max": "max 100000"}, None),
        ({"a/b/cpu.max": "150000"}, 1.5),
        # a group around it has less, its own has none
        ({"a/b/cpu.max": "max 100000", "a/cpu.max": "765000 100000"}, 7.65),
        ({"a/b/cpu.max": "400000 100000", "cpu.max": "50000 100000"}, 0.5),
        ({"a/c/cpu.max": "100000 100000"}, None),
        ({"a/b/cpu.max": "nonsense"}, None),
        ({}, None),
    ],
)
def test_the_least_quota_of_all_groups_around(
    files: dict[str, str], quota: float | None, tmp_path: Path
) -> None:
    assert cpu_quota(tree(tmp_path, "0::/a/b", V2, files)) == quota


@pytest.mark.parametrize(
    ("own", "top", "files", "quota"),
    [
        ("/docker/x", "/", {"docker/x": (300000, 100000)}, 3.0),
        ("/docker/x", "/", {"docker/x": (-1, 100000), "docker": (100000, 50000)}, 2.0),
        # a container that sees its own group as the top, or a group that is not below what is mounted
        ("/docker/x", "/docker/x", {"": (250000, 100000)}, 2.5),
        ("/../elsewhere", "/", {"": (250000, 100000)}, 2.5),
    ],
)
def test_quotas_of_the_first_version(
    own: str, top: str, files: dict[str, tuple[int, int]], quota: float, tmp_path: Path
) -> None:
    written = {}
    for folder, (time, period) in files.items():
        written[f"cpu,cpuacct/{folder}/cpu.cfs_quota_us"] = str(time)
        written[f"cpu,cpuacct/{folder}/cpu.cfs_period_us"] = str(period)
    groups = f"4:memory:/elsewhere\n3:cpu,cpuacct:{own}"
    assert cpu_quota(tree(tmp_path, groups, V1.format(top=top), written)) == quota


def test_both_versions_at_once_and_a_name_with_a_space(tmp_path: Path) -> None:
    mounts = "\n".join(
        [V1.format(top="/"), V2.replace("/sys/fs/cgroup ", r"/sys/fs/cgroup/my\040groups ")]
    )
    files = {"my groups/a/cpu.max": "500000 100000", "cpu,cpuacct/b/cpu.cfs_quota_us": "400000"}
    root = tree(tmp_path, "1:cpu,cpuacct:/b\n0::/a", mounts, files)
    assert cpu_quota(root) == 4.0


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": "4194304", "memory.current": "1048576"}, 3072),
        # what files have that nobody read lately is given back at once
        (
            {
                "memory.max": "4194304",
                "memory.current": "4194304",
                "memory.stat": "anon 1\ninactive_file 524288\nactive_file 7",
            },
            512,
        ),
        ({"memory.max": "max", "memory.current": "1048576"}, 8192),
        ({"memory.max": "4096", "memory.current": "8192"}, 0),
        # the machine itself has less
        ({"memory.max": "1073741824", "memory.current": "0"}, 8192),
        ({"memory.max": "nonsense"}, 8192),
        ({}, 8192),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_a_container_has_no_more_memory_than_its_group(
    version: int, files: dict[str, str], left: int, tmp_path: Path
) -> None:
    """A server told of 60 GiB in a container of 4 and was killed when it took five."""
    names = {
        "memory.max": "memory.limit_in_bytes",
        "memory.current": "memory.usage_in_bytes",
        "memory.stat": "memory.stat",
    }
    if version == 1:
        mounts = V1.format(top="/").replace("cpu,cpuacct", "memory")
        groups = "4:memory:/a/b\n3:cpu,cpuacct:/elsewhere"
        given = {f"memory/a/{names[name]}": text for name, text in files.items()}
        given = {name: text.replace("inactive", "total_inactive") for name, text in given.items()}
    else:
        mounts, groups = V2, "0::/a/b"
        given = {f"a/{name}": text for name, text in files.items()}
    root = tree(tmp_path, groups, mounts, given)
    (root / "proc/meminfo").write_text("MemTotal: 16384 kB\nMemAvailable: 8192 kB\n")
    assert available_bytes(root) == left * 1024


def test_no_groups_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    assert cpu_quota(tree(tmp_path, "garbage", "more garbage\n1 2 - x", {})) is None


@pytest.mark.parametrize(
    ("quota", "expected"), [("", 8), ("200000", 2), ("765000", 7), ("50000", 1), ("9900000", 8)]
)
def test_threads_fit_into_the_quota(
    quota: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: 8)
    assert usable_threads(tree(tmp_path, "0::/", V2, {"cpu.max": quota})) == expected


@pytest.fixture
def fresh_limit() -> Iterator[None]:
    """What torch was told, and that the quota was looked up, is forgotten."""
    before = torch.get_num_threads()
    threads.limit_to_quota.cache_clear()
    yield
    threads.limit_to_quota.cache_clear()
    torch.set_num_threads(before)
    threads.limit_to_quota()


@pytest.mark.usefixtures("fresh_limit")
def test_all_threads_are_those_of_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "usable_threads", lambda: 1)
    torch.set_num_threads(2)
    set_threads(None)
    assert torch.get_num_threads() == 1
    # what is asked for counts
    set_threads(2)
    set_threads(None)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("fresh_limit")
def test_the_environment_outranks_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(threads, "usable_threads", lambda: 1)
    torch.set_num_threads(2)
    set_threads(None)
    assert torch.get_num_threads() == 2


def test_info_shows_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linspec.bench.library.cpu_quota", lambda: 1.5)
    assert info()["cpu_quota"] == 1.5


def real_group() -> Path:
    """A new group of this machine with the time of one core and a half, or a reason to skip."""
    for parent, name, text in (
        ("/sys/fs/cgroup", "cpu.max", "150000 100000"),
        ("/sys/fs/cgroup/cpu", "cpu.cfs_quota_us", "150000"),
    ):
        group = Path(parent) / f"linspec-test-{os.getpid()}"
        if not (Path(parent) / "cgroup.procs").exists():
            continue
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / name).write_text(text)
        except OSError:
            group.rmdir()
            continue
        return group
    pytest.skip("no control group with a limit on processor time can be made here")


def test_a_real_quota_is_seen() -> None:
    group = real_group()
    try:
        code = (
            "import os, pathlib\n"
            f"pathlib.Path({str(group / 'cgroup.procs')!r}).write_text(str(os.getpid()))\n"
            "from linspec.utils.cores import cpu_quota, usable_threads; print(cpu_quota(), usable_threads())"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.split() == ["1.5", "1"], done.stderr
    finally:
        group.rmdir()
