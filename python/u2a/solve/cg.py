"""Preconditioned conjugate gradients for several right-hand sides at once.

The columns share products (`Operator.matmat`) and the preconditioner, nothing else; one that has
converged, or has met negative curvature, costs no more products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from u2a.errors import GuardError
from u2a.solve.system import Found, Options, State, System, negative, rayleigh

NAMES = ("x", "r", "d", "rz", "low", "high", "count", "broken")


def _start(b: Tensor, options: Options) -> dict[str, Tensor]:
    z = b.clone() if options.precond is None else options.precond(b)
    k, wide = len(b), torch.float64
    return {
        "x": torch.zeros_like(b),
        "r": b.clone(),
        "d": z,
        "rz": (b * z).sum(1),
        "low": torch.full((k,), torch.inf, dtype=wide),
        "high": torch.full((k,), -torch.inf, dtype=wide),
        "count": torch.zeros(k, dtype=torch.int64),
        "broken": torch.zeros(k, dtype=torch.bool),
    }


def cg(system: System, b: Tensor, options: Options, state: State | None) -> Found:
    """Hestenes and Stiefel 1952. Raises GuardError for negative curvature where asked to, and for a
    preconditioner that is not positive definite."""
    s = _start(b, options)
    if state is not None:
        s = {n: state.tensors[n].to(s[n], copy=True) for n in NAMES}
    stop = options.stop.cpu()
    for _ in range(options.max_iter):
        live = (s["r"].norm(dim=1).cpu() > stop) & ~s["broken"]
        rows = live.nonzero().flatten()
        if not len(rows):
            break
        at = rows.to(b.device)
        d = s["d"][at]
        product = system.apply(d)
        seen = torch.tensor(rayleigh(d, product), dtype=torch.float64)
        s["low"][rows] = s["low"][rows].minimum(seen)
        s["high"][rows] = s["high"][rows].maximum(seen)
        s["count"][rows] += 1
        if bool((seen <= 0).any()):
            negative(float(seen.min()), options.raises)
            s["broken"][rows[seen <= 0]] = True
            good = seen > 0
            at, d, product = at[good.to(b.device)], d[good.to(b.device)], product[good.to(b.device)]
            if not len(at):
                continue
        _step(s, at, d, product, options)
    return Found(
        s["x"], s["count"].tolist(), s["low"].tolist(), s["high"].tolist(),
        {n: t.clone() for n, t in s.items()},
    )  # fmt: skip


def _step(s: dict[str, Tensor], at: Tensor, d: Tensor, product: Tensor, options: Options) -> None:
    """One step of the rows `at`."""
    rz = s["rz"][at]
    alpha = (rz / (d * product).sum(1))[:, None]
    s["x"][at] += alpha * d
    r = s["r"][at] - alpha * product
    z = r if options.precond is None else options.precond(r)
    new = (r * z).sum(1)
    if bool((new < 0).any()):
        raise GuardError("solve: the preconditioner is not positive definite")
    s["r"][at], s["rz"][at] = r, new
    s["d"][at] = z + (new / rz)[:, None] * d
