"""SQLite's file: on a disk of this host, private, in WAL mode, with room to grow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import sqlalchemy as sa

from gateway_app.doctor.connecting import reading, sqlite_path
from gateway_app.doctor.disk import disk_space
from gateway_app.doctor.finding import Finding, fail, ok, unknown, warn
from gateway_app.doctor.secrets import OTHERS
from tasks.settings import Settings

#: File systems of other hosts: SQLite's locks and its shared memory do not reach over them.
NETWORK = ("nfs", "cifs", "smb", "9p", "afs", "ceph", "gluster", "lustre", "fuse.sshfs", "fuse.s3", "beegfs", "gpfs")


def examine(settings: Settings) -> Iterator[Finding]:
    """Look at the file, if there is one."""
    path = sqlite_path(settings)
    if path is None or not path.parent.is_dir():
        return
    yield _file_system(path.parent.resolve())
    yield disk_space("database disk", path.parent)
    if path.exists():
        yield _private(path)
        yield _journal(settings, path)


def _file_system(folder: Path) -> Finding:
    mounts = [part for part in psutil.disk_partitions(all=True) if folder.is_relative_to(part.mountpoint)]
    if not mounts:
        return unknown("database file system", f"the mount of {folder} is not to be found")
    kind = max(mounts, key=lambda part: len(part.mountpoint)).fstype
    if kind.startswith(NETWORK):
        says = f"{folder} is on {kind}, a network file system: SQLite's locks do not hold there, and the file may be ruined"
        return fail("database file system", says, "a local disk, or DATABASE_URL=postgresql://…")
    return ok("database file system", kind)


def _private(path: Path) -> Finding:
    folder = path.parent
    modes = [item.stat().st_mode & OTHERS for item in (folder, path)]
    if all(modes):
        says = f"others may read {path}: prompts are sealed in it, who asked when is not"
        return warn("database file", says, f"chmod 600 {path}*")
    return ok("database file", "for its owner only")


def _journal(settings: Settings, path: Path) -> Finding:
    try:
        with reading(settings) as connection:
            mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar_one()
    except sa.exc.SQLAlchemyError as error:
        cause = getattr(getattr(error, "orig", None), "sqlite_errorname", type(error).__name__)
        return fail("database journal", f"{path} cannot be read: {cause}", "restore it from a backup")
    if mode != "wal":
        says = f"the journal's mode is {mode}: readers and writers wait for each other"
        return warn("database journal", says, f"sqlite3 {path} 'PRAGMA journal_mode=WAL'")
    return ok("database journal", "in WAL mode")
