"""Whether a folder is fit for a SQLite file that several processes share."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from aqueue.findings import Finding

#: Where locks and shared memory are not to be relied on, by the names that Linux gives file systems.
_NETWORKS: Final = frozenset(
    "9p afs beegfs ceph cifs coda fuse.glusterfs fuse.rclone fuse.s3fs fuse.sshfs gfs2 glusterfs lustre ncpfs nfs nfs4 "
    "ocfs2 orangefs smb2 smb3 smbfs virtiofs".split()
)
_MOUNTS: Final = Path("/proc/self/mountinfo")
#: Bytes, and the part of the disk, below which it is told.
_FEW: Final = 100 * 1024 * 1024
_PART: Final = 0.02


def check(path: Path) -> list[Finding]:
    """Looks at the machine alone."""
    mounts = _MOUNTS.read_text(errors="replace") if _MOUNTS.exists() else ""
    found = [*network(path, mounts)]
    if found or not path.parent.exists():
        return found  # whoever opens the file says that there is no such folder
    disk = os.statvfs(path.parent)
    return [*space(path, disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize)]


def network(path: Path, mounts: str) -> Iterator[Finding]:
    """``mounts`` is as in ``/proc/self/mountinfo``."""
    kind = file_system(path.resolve(), mounts)
    if kind in _NETWORKS:
        what = f"{path} is on a network file system ({kind}), whose locks SQLite can't rely on: the file would break"
        yield Finding("AQ141", what, "put it on a disk of this machine, or use Redis or RabbitMQ")


def file_system(path: Path, mounts: str) -> str:
    """The kind of the innermost mount that a path is in."""
    best, kind = -1, ""
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        if len(fields) < 5 or not after:
            continue
        point = Path(fields[4].replace("\\040", " "))
        if path.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), after.split()[0]
    return kind


def space(path: Path, free: int, size: int) -> Iterator[Finding]:
    """In bytes."""
    if free < _FEW and free < size * _PART:
        what = f"the disk of {path} has {free // 1024 // 1024} MiB left; when it is full, sends are refused"
        yield Finding("AQ142", what, "make room")
