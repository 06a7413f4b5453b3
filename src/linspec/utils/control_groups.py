"""The control groups that this process is in, of both versions: containers and services limit by them.

for folder in groups_of("memory"):
    print(folder / "memory.max")
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def groups_of(controller: str, root: Path = ROOT) -> Iterator[Path]:
    """Folders of the groups of this process that may limit what a controller counts, and those around.

    A group has no more than the groups it is in. root: of the file system that is asked.
    """
    for mount, own in _mounts(controller, root):
        folder = mount / own
        while True:
            yield folder
            if folder == mount:
                break
            folder = folder.parent


def lines_of(path: Path) -> list[str]:
    """The lines of a file of the system; none if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def first_line(path: Path) -> str:
    """The first line of a file of the system; '' if it has none."""
    return "".join(lines_of(path)[:1]).strip()


def _mounts(controller: str, root: Path) -> Iterator[tuple[Path, PurePosixPath]]:
    """Each mounted hierarchy that knows of the controller, and where in it this process is."""
    groups = dict(_own_groups(root))
    for line in lines_of(root / "proc/self/mountinfo"):
        # 36 35 98:0 /root /mount/point rw,noatime master:1 - type source options
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        limits = kind[0] == "cgroup2" or (kind[0] == "cgroup" and controller in kind[2].split(","))
        own = groups.get("" if kind[0] == "cgroup2" else controller)
        if limits and own is not None:
            top, point = map(_plain, fields[3:5])
            yield root / point.lstrip("/"), _within(own, top)


def _own_groups(root: Path) -> Iterator[tuple[str, str]]:
    """The group of this process by controller, '' for those of version 2."""
    for line in lines_of(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for name in controllers.split(","):
            yield name, path


def _within(group: str, top: str) -> PurePosixPath:
    """The path of a group below the group that is mounted; a container sees only its own."""
    path = PurePosixPath(group)
    inside = path.relative_to(top) if path.is_relative_to(top) else PurePosixPath()
    return PurePosixPath() if ".." in inside.parts else inside


def _plain(name: str) -> str:
    """A path as mountinfo writes it: spaces and the like are octal numbers there."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), name)
