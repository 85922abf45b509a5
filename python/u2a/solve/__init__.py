"""u2a.solve: x with (A + damping I) x = rhs for a curvature operator A, and how far to trust it.

Every solution carries the true residual of a fresh product and what curvature was met on the way.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor

from u2a.curvature import GaussNewton, Hessian, Operator, Sum
from u2a.errors import GuardError
from u2a.solve.cg import cg
from u2a.solve.damping import automatic, mean_of, parse, resolve
from u2a.solve.direct import direct
from u2a.solve.minres import minres
from u2a.solve.neumann import neumann
from u2a.solve.precond import preconditioner
from u2a.solve.solution import Solution, report
from u2a.solve.system import Found, Options, State, System, numbers

Method = Literal[
    "cg", "minres", "neumann", "woodbury", "kfac", "ekfac", "datainf", "diagonal", "identity"
]
METHODS: tuple[str, ...] = get_args(Method)
ITERATIVE = {"cg": cg, "minres": minres, "neumann": neumann}
OnNegative = Literal["raise", "stop", "damp"]
RETRIES = 8

_log = logging.getLogger("u2a.solve")


Rhs = Mapping[str, Tensor]


@overload
def solve(
    operator: Operator | None,
    rhs: Rhs,
    method: Method = "cg",
    *,
    damping: str | float = "rel:0.1",
    precond: Any = None,
    tol: float = 1e-6,
    max_iter: int = 200,
    on_negative: OnNegative = "raise",
    step: float | None = None,
    state: State | None = None,
    seed: int = 0,
    check: bool = False,
) -> Solution: ...
@overload
def solve(
    operator: Operator | None,
    rhs: Sequence[Rhs],
    method: Method = "cg",
    *,
    damping: str | float = "rel:0.1",
    precond: Any = None,
    tol: float = 1e-6,
    max_iter: int = 200,
    on_negative: OnNegative = "raise",
    step: float | None = None,
    state: State | None = None,
    seed: int = 0,
    check: bool = False,
) -> list[Solution]: ...
def solve(
    operator: Operator | None,
    rhs: Rhs | Sequence[Rhs],
    method: Method = "cg",
    *,
    damping: str | float = "rel:0.1",
    precond: Any = None,
    tol: float = 1e-6,
    max_iter: int = 200,
    on_negative: OnNegative = "raise",
    step: float | None = None,
    state: State | None = None,
    seed: int = 0,
    check: bool = False,
) -> Solution | list[Solution]:
    """Solve (A + damping I) x = rhs.

    Args:
        operator: A, from `u2a.curvature` or anything with `matvec`, `mean_eigenvalue` and
            `diagonal` on {name: tensor}; None stands for A = 0 and goes with "identity".
        rhs: {parameter name: tensor}; the solution has its names, shapes, dtypes and devices.
            Inside, one float32 vector (float64 if rhs is). A list of them gives a list of
            solutions that share damping and preconditioner.
        method: "cg": conjugate gradients, for a positive definite A + damping I. "minres": of any
            sign. "neumann": x += eta M^-1 (rhs - A x) (converges for eta < 2 / lambda_max; without
            M it equals differentiating that many gradient-descent steps; the only one for a
            `Stream`). "woodbury": exact for an `EmpiricalFisher` or `Features`, an n x n system.
            "datainf": the same matrix, inverse and mean over examples swapped. "kfac", "ekfac":
            `KFAC.of(operator)`, `EKFAC.of(operator)` inverted; the residual is still that of the
            operator given. "diagonal": rhs / (diag A + damping). "identity": rhs / damping, the
            gamma-approximation with gamma = damping.
        damping: a number; "rel:r" for r times the mean eigenvalue of A (in "datainf" of each
            parameter's block, as its authors do); "auto:r" ("auto" = "auto:0.1") for the smallest
            one that lifts a Lanczos bound of the lowest eigenvalue to r times the mean
            |eigenvalue|, which "rel:r" means too for a `Hessian` (not in "minres"). Added to that
            of a `Damped` operator, but "auto" counts that in.
        precond: of "cg", "minres", "neumann": "jacobi" (`positive_diagonal`), "nystrom:R" (R
            products; positive semidefinite A), "kfac", "ekfac", an operator with `inverse(tree,
            damping)`, or a callable on trees, symmetric positive definite.
        tol: iterations stop when the recursive residual falls below tol ||rhs||.
        max_iter: products at most; running out is no error, the residual tells.
        on_negative: on d.(A + damping I)d <= 0 in "cg", "neumann" and "diagonal": "raise"
            GuardError, "stop" and return what is reached so far, flagged, or "damp": start again
            with more damping, from a Lanczos bound. "minres" takes any sign and only flags it.
        step: eta of "neumann"; default 1 / the largest eigenvalue of M^-1 A by 20 power iterations.
        state: `Solution.state` of a call with the same arguments: goes on from there, bit for bit
            as if it had not stopped, with that call's damping.
        seed: of Nystrom's and Lanczos' random vectors and of sampled labels.
        check: measure the symmetry of the operator at the solution by one more product, keep it in
            `Solution.symmetry`, and warn in the log when rounding does not explain it.

    Raises:
        ValueError: unknown method or option, a damping that cannot be used, an operator without
            what the method needs.
        GuardError: negative curvature under on_negative="raise", non-finite products, a
            preconditioner that is not positive definite.
    """
    many = not isinstance(rhs, Mapping)
    trees = list(rhs) if not isinstance(rhs, Mapping) else [rhs]
    _check(method, on_negative, operator, trees, precond, state)
    if check and getattr(operator, "stochastic", False):
        raise ValueError("solve: check needs a fixed operator, got a stream")
    system = System(operator, trees[0])
    b = torch.stack([system.flat(tree) for tree in trees])
    size = b.norm(dim=1)
    if not bool(size.isfinite().all()):
        raise GuardError("solve: the right-hand side holds non-finite values")
    note = _damp(damping, system, method, state, seed)
    if method in ITERATIVE and system.stochastic and method != "neumann":
        raise ValueError(f"solve: {method} needs a fixed operator, got a stream; use 'neumann'")
    if not bool(size.any()):
        lam = mean_of(system.lam)
        found = Found(b, [0] * len(b), [lam] * len(b), [lam] * len(b))
        solutions = report(method, system, b, size, found, note)
        return solutions if many else solutions[0]
    options = Options(tol * size, max_iter, on_negative == "raise", None, step)
    for _ in range(RETRIES):
        found = _run(method, system, b, options, precond, state, seed)
        if method == "minres" or min(found.low) > 0 or on_negative != "damp":
            break
        note, state = _raise_damping(system, damping, min(found.low), seed), None
    solutions = report(method, system, b, size, found, note, seed if check else None)
    return solutions if many else solutions[0]


def _check(
    method: str,
    on_negative: str,
    operator: Operator | None,
    trees: Sequence[Rhs],
    precond: Any,
    state: State | None,
) -> None:
    if method not in METHODS:
        raise ValueError(f"solve: method must be one of {', '.join(METHODS)}; got {method!r}")
    if on_negative not in get_args(OnNegative):
        raise ValueError(
            f"solve: on_negative must be 'raise', 'stop' or 'damp', got {on_negative!r}"
        )
    if operator is None and method != "identity":
        raise ValueError(f"solve: operator None goes with method 'identity', got {method!r}")
    if not trees:
        raise ValueError("solve: rhs must hold at least one right-hand side, got none")
    if precond is not None and method not in ITERATIVE:
        raise ValueError(f"solve: precond goes with {', '.join(ITERATIVE)}; got {method!r}")
    if state is not None and state.method != method:
        raise ValueError(f"solve: the state is one of {state.method!r}, got method {method!r}")


def _damp(damping: str | float, system: System, method: str, state: State | None, seed: int) -> str:
    """Sets the system's damping, that of the state where there is one."""
    if state is None:
        note = resolve(damping, system, method, seed)
        if note:
            _log.info("%s: %s", method, note)
        return note
    kind, number = parse(damping)
    lam, draw = state.tensors["solve"].tolist()
    if kind == "abs" and system.own + number != lam:
        raise ValueError(f"solve: the state has damping {lam:g}, got {system.own + number:g}")
    system.lam = lam
    if draw >= 0:
        system.base.draw = int(draw)
    return "damping of the state"


def _run(
    method: str,
    system: System,
    b: Tensor,
    options: Options,
    precond: Any,
    state: State | None,
    seed: int,
) -> Found:
    if method in ITERATIVE:
        made = preconditioner(precond, system, seed)
        found = ITERATIVE[method](system, b, replace(options, precond=made), state)
        draw = getattr(system.operator, "draw", -1)
        found.tensors["solve"] = numbers(mean_of(system.lam), draw)
        return found
    found = direct(method, system, b)
    if min(found.low) <= 0 and options.raises:
        raise GuardError(
            f"solve: negative curvature {min(found.low):.3e} in the {method} approximation, raise "
            "the damping or use GaussNewton"
        )
    return found


def _raise_damping(system: System, damping: str | float, curvature: float, seed: int) -> str:
    """More damping than before, and than the direction met asks for."""
    assert isinstance(system.lam, float)
    least = system.lam + max(-1.5 * curvature, 0.1 * system.lam)
    kind, factor = parse(damping)
    note = automatic(system, factor if kind != "abs" else 0.1, seed)
    system.lam = max(least, system.lam)
    note = f"negative curvature {curvature:.3e}; damping raised to {system.lam:.3e}; {note}"
    _log.warning(note)
    return note


__all__ = [
    "METHODS",
    "GaussNewton",
    "Hessian",
    "Method",
    "Operator",
    "Solution",
    "State",
    "Sum",
    "solve",
]
