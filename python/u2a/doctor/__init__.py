"""u2a doctor: is this installation fit, is this model supported and right, are these data sound?

Every check runs, whatever the others found. The exit code is that of the first kind that failed:
4 environment, 2 configuration or model, 3 data, 6 numbers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from u2a import env
from u2a.errors import ConfigError, DataError, EnvironmentError_, GuardError, U2AError

if TYPE_CHECKING:
    from u2a.config import Config

OLDEST = {"torch": "2.11", "transformers": "5.0", "peft": "0.17", "safetensors": "0.4"}
CODES = (EnvironmentError_.exit_code, ConfigError.exit_code, DataError.exit_code,
         GuardError.exit_code)  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One line of the table. `state`: "ok", "FAIL" or "skip"; `code`: exit code of a failure."""

    name: str
    state: str
    detail: str
    code: int = 0


def passed(name: str, ok: bool, detail: str, code: int) -> Check:
    return Check(name, "ok" if ok else "FAIL", detail, 0 if ok else code)


def measured(name: str, value: float, limit: float, what: str = "off by") -> Check:
    """A number that must not exceed its limit; one that is not finite fails."""
    detail = f"{what} {value:.1e}, limit {limit:.0e}"
    return passed(name, value <= limit, detail, GuardError.exit_code)


def guarded(name: str, code: int, run: Callable[[], Iterator[Check]]) -> list[Check]:
    """The checks of `run`; what stops it is one more that failed."""
    found: list[Check] = []
    try:
        found.extend(run())
    except U2AError as e:
        found.append(Check(name, "FAIL", str(e), e.exit_code))
    except (OSError, ValueError, RuntimeError, ImportError) as e:
        found.append(Check(name, "FAIL", f"{type(e).__name__}: {e}", code))
    return found


def environment() -> Iterator[Check]:
    """Packages and their versions, kernels and who serves them."""
    code = EnvironmentError_.exit_code
    facts = env.report()
    for package, oldest in OLDEST.items():
        found = facts["versions"].get(package)
        detail = f"{found or 'not installed'}, wanted {oldest} or newer"
        yield passed(package, found is not None and _newer(found, oldest), detail, code)
    kernels = facts.get("kernels", facts.get("torch"))
    if not isinstance(kernels, dict):
        yield passed("kernels", False, str(kernels), code)
        return
    key = "CUDA" if facts["gpu"] else "CPU"
    serving = [op.get(key) for op in kernels["ops"].values()]
    counts = ", ".join(f"{serving.count(s)} {s}" for s in sorted({str(s) for s in serving}))
    yield passed("kernels", None not in serving, f"{key}: {counts}", code)
    yield passed("device", True, str(facts["gpu"] or f"CPU, {facts['cpu']}"), code)


def _newer(found: str, oldest: str) -> bool:
    def numbers(version: str) -> list[int]:
        return [int("".join(c for c in x if c.isdigit()) or 0) for x in version.split(".")[:2]]

    return numbers(found.split("+")[0]) >= numbers(oldest)


def examine(
    cfg: Config | None = None, model: str | None = None, revision: str | None = None
) -> list[Check]:
    """All checks for a configuration, or for the name or folder of a model, or for neither."""
    found = guarded("environment", EnvironmentError_.exit_code, environment)
    if any(c.state == "FAIL" for c in found) or (cfg is None and model is None):
        return found
    subject = importlib.import_module("u2a.doctor.subject")
    checks: list[Check] = subject.examine(cfg, model, revision)
    return found + checks


def exit_code(checks: list[Check]) -> int:
    """0, or the code of the most basic failure."""
    codes = {c.code for c in checks if c.state == "FAIL"}
    return next((c for c in CODES if c in codes), next(iter(codes), 0))


def as_json(checks: list[Check]) -> dict[str, Any]:
    return {"exit_code": exit_code(checks), "checks": [asdict(c) for c in checks]}


def table(checks: list[Check]) -> str:
    width = max(len(c.name) for c in checks)
    indent = "\n" + " " * (width + 8)
    lines = [
        f"{c.state:<4}  {c.name:<{width}}  {c.detail.replace(chr(10), indent)}" for c in checks
    ]
    failed = sum(c.state == "FAIL" for c in checks)
    end = f"{failed} of {len(checks)} checks failed" if failed else f"{len(checks)} checks passed"
    return "\n".join([*lines, end])
