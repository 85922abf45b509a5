"""Every failure a user can cause or meet, with the exit code the command line gives it.

Messages name the file or the key, what was wanted and what came; they print without traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class U2AError(Exception):
    """Base of all expected failures."""

    exit_code = 1


class ConfigError(U2AError):
    """Bad configuration: `faults` holds all of them, one line each."""

    exit_code = 2

    def __init__(self, faults: Sequence[str] | str, source: str = "config") -> None:
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        count = f"{len(self.faults)} fault{'s' if len(self.faults) != 1 else ''}"
        super().__init__("\n".join([f"{source}: {count}", *(f"  {f}" for f in self.faults)]))


class DataError(U2AError):
    """Bad input data: `faults` holds up to ten row errors as "file:line: what"."""

    exit_code = 3

    def __init__(self, message: str, faults: Sequence[str] = ()) -> None:
        self.faults = list(faults)
        super().__init__("\n".join([message, *(f"  {f}" for f in self.faults)]))


class EnvironmentError_(U2AError):
    """A missing package, device, kernel, network or file-system feature."""

    exit_code = 4


class GuardError(U2AError):
    """A numeric guard tripped: collapse, non-finite loss, no effect."""

    exit_code = 6


class CorruptError(U2AError):
    """An artifact differs from what its marker promises."""

    exit_code = 7


class LockError(U2AError):
    """Another process holds the run directory."""

    exit_code = 8


class MismatchError(U2AError):
    """The run directory was made with other settings or inputs."""

    exit_code = 8
