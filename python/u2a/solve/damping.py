"""How much to add to the diagonal: a number, a share of the mean eigenvalue, or what a Lanczos
bound asks for."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from u2a.curvature.lanczos import Spectrum, lanczos
from u2a.solve.direct import block_means, roots
from u2a.solve.system import System

WANTED = "solve: damping must be a number, 'rel:<positive>', 'auto' or 'auto:<positive>'"


def parse(damping: Any) -> tuple[str, float]:
    """("abs" | "rel" | "auto", number). Raises ValueError."""
    if not isinstance(damping, str):
        value = float(damping)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"solve: damping must be finite and at least 0, got {damping}")
        return "abs", value
    kind, _, number = ("auto:0.1" if damping == "auto" else damping).partition(":")
    try:
        factor = float(number)
    except ValueError:
        factor = math.nan
    if kind not in ("rel", "auto") or not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"{WANTED}, got {damping!r}")
    return kind, factor


def resolve(damping: Any, system: System, method: str, seed: int = 0) -> str:
    """Sets `system.lam`, the operator's own damping included; returns what was done, "" for a
    number.

    "rel:r" is r times the mean eigenvalue. "auto:r" is the smallest damping that lifts the lower
    Lanczos bound of the spectrum to r times the mean |eigenvalue|; "rel:r" means that too for an
    operator that may be indefinite, except in "minres", which needs no definite matrix.
    """
    kind, factor = parse(damping)
    if kind == "abs":
        system.lam = system.own + factor
        return ""
    if system.operator is None:
        raise ValueError(f"solve: damping {damping!r} needs an operator, got None")
    if kind == "auto" or not (system.definite or method == "minres"):
        return automatic(system, factor, seed)
    if method == "datainf":
        system.lam = system.own + factor * block_means(system, roots(system, method))
        return f"damping {factor:g} x the mean eigenvalue of each parameter's block"
    mean = system.operator.mean_eigenvalue()
    if not mean > 0:
        raise ValueError(
            f"solve: damping {damping!r} needs a positive mean eigenvalue, got {mean:.3e}; "
            "give an absolute damping or 'auto'"
        )
    system.lam = system.own + factor * mean
    return f"damping {factor:g} x mean eigenvalue {mean:.3e}"


def spectrum(system: System, seed: int = 0) -> Spectrum:
    return lanczos(lambda v: system.product(v[None])[0], system.vector, seed=seed)


def automatic(system: System, factor: float, seed: int = 0) -> str:
    if system.stochastic:
        raise ValueError("solve: damping 'auto' needs a fixed operator; give a number or a sample")
    found = spectrum(system, seed)
    known = getattr(system.operator, "definite", False)
    low = max(found.low, 0.0) if known else found.low
    system.lam = max(system.own, factor * found.mean_abs - low)
    return (
        f"damping {system.lam:.3e} from Lanczos ({found.products} products): eigenvalues in "
        f"[{found.low:.3e}, {found.high:.3e}], mean size {found.mean_abs:.3e}"
    )


def mean_of(lam: float | Tensor) -> float:
    return float(lam.double().mean()) if isinstance(lam, Tensor) else lam
