"""One process per run directory: an flock on LOCK, whose text says who holds it.

The kernel frees the flock of a dead process, so a stale lock on this host is simply taken over; the
text covers what flock cannot see, a holder on another host of a shared file system.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path

from u2a.errors import EnvironmentError_, LockError


def _process_start(pid: int) -> str | None:
    """Start time of a process in clock ticks, as /proc says; tells a reused pid from the holder."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _alive(pid: int, start: str | None) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    now = _process_start(pid)
    return start is None or now is None or now == start


def _holder(path: Path) -> dict[str, object]:
    try:
        text = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return text if isinstance(text, dict) else {}


def acquire(path: Path) -> int:
    """Takes the lock file; returns its open descriptor. Raises LockError naming host and pid."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _same(fd, path):
                os.close(fd)
                continue
            _refuse_foreign(path)
            break
        except BlockingIOError:
            os.close(fd)
            raise _held(path, _holder(path)) from None
        except LockError:
            os.close(fd)
            raise
        except OSError as e:
            os.close(fd)
            raise EnvironmentError_(f"{path}: the file system offers no locks: {e}") from None
    me = {"host": socket.gethostname(), "pid": os.getpid(), "process": _process_start(os.getpid())}
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps({**me, "start": time.strftime("%Y-%m-%dT%H:%M:%S%z")}).encode(), 0)
    os.fsync(fd)
    return fd


def release(fd: int, path: Path) -> None:
    path.unlink(missing_ok=True)
    os.close(fd)


def _same(fd: int, path: Path) -> bool:
    """Whether the file we locked is still the one at `path` (a releasing holder unlinks it)."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), there)


def _refuse_foreign(path: Path) -> None:
    holder = _holder(path)
    pid = holder.get("pid")
    if not isinstance(pid, int):
        return
    here = holder.get("host") == socket.gethostname()
    start = holder.get("process")
    if not here or _alive(pid, start if isinstance(start, str) else None):
        raise _held(path, holder)


def _held(path: Path, holder: dict[str, object]) -> LockError:
    who = f"pid {holder.get('pid')} on {holder.get('host')} since {holder.get('start')}"
    return LockError(
        f"{path}: held by {who}; wait for it, use another --out, or delete the file if that "
        "process is gone"
    )
