"""Which losses a configuration may name, told without importing torch.

A loss of single answers needs nothing else; one of pairs needs `data.alternates`. The others want
what rows do not carry, and are functions of `u2a.losses` for a training loop of one's own.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from u2a.objective_names import BY_ROW

if TYPE_CHECKING:
    from u2a.config import Config

SINGLE = (
    "ga", "ga_sum", "graddiff", "npo", "simnpo", "wga", "tnpo", "wtnpo", "satimp", "unlikelihood",
    "topr", "fforget_pearson", "fforget_sq_hellinger", "fforget_js", "fforget_kl",
)  # fmt: skip
PAIRED = (
    "dpo", "altpo", "idkpo", "llmu", "exmate", "mate", "neat", "flat_kl", "flat_tv", "flat_js",
    "flat_pearson", "flat_jeffrey", "flat_reverse_kl", "flat_sq_hellinger", "flat_neyman",
)  # fmt: skip
_LIKELIER = "makes the answers likelier"
_VOCABULARY = "needs whole-vocabulary logits: u2a.losses.vocabulary"
LIBRARY = {
    "nll": _LIKELIER,
    **{
        f"fsft_{kind}": _LIKELIER
        for kind in ("tv", "pearson", "sq_hellinger", "js", "kl", "reverse_kl")
    },
    **dict.fromkeys(("undial", "ceu", "pdu", "kl_retain"), _VOCABULARY),
    "rmu": "needs hidden states: u2a.losses.hidden",
    "pmpo": "needs sampled answers: u2a.losses.steps",
    "fdpg": "needs sampled answers: u2a.losses.fdpg",
}
INEXACT = ("wtnpo",)
OPTIONS: dict[str, tuple[str, ...]] = {
    "simnpo": ("margin",), "wtnpo": ("alpha",), "satimp": ("beta2",), "unlikelihood": ("floor",),
    "topr": ("low", "high"), "llmu": ("forget", "normal"), "exmate": ("c",), "mate": ("c",),
}  # fmt: skip


def loss_name(value: Any) -> str:
    """The name if a configuration may use it. Raises ValueError saying why not, or the nearest."""
    known = SINGLE + PAIRED
    if value in known:
        return str(value)
    words = f"one of {', '.join(known)}"
    if value in LIBRARY:
        raise ValueError(f"{words} ({value} {LIBRARY[value]})")
    near = difflib.get_close_matches(str(value), [*known, *LIBRARY], n=1, cutoff=0.5)
    raise ValueError(words + (f", nearest {near[0]!r}" if near else ""))


def combination_faults(cfg: Config) -> list[str]:
    """What the configured loss cannot be combined with, one line each."""
    loss, s = cfg.unlearn.loss, cfg.solve
    out = []
    for key in cfg.unlearn.options.keys() - set(OPTIONS.get(loss, ())):
        has = ", ".join(OPTIONS.get(loss, ())) or "none"
        out.append(f"unlearn.options.{key}: unknown, wanted one of those of loss {loss}: {has}")
    if loss in INEXACT and cfg.unlearn.solver == "lbfgs":
        out.append(
            f"unlearn.solver: 'lbfgs', wanted trainer beside loss {loss}: its value is not "
            "the integral of its gradient, which a line search needs"
        )
    if loss in PAIRED and cfg.data.alternates is None:
        out.append(
            f"data.alternates: None, wanted a file beside unlearn.loss {loss}, as "
            "`u2a prep CONFIG --alternates KIND` writes it"
        )
    if loss not in PAIRED and cfg.data.alternates is not None:
        out.append(
            f"data.alternates: a file, wanted none beside unlearn.loss {loss}: it takes "
            "single answers"
        )
    by_row = {"solve.curvature": s.curvature, "solve.method": s.method, "solve.precond": s.precond}
    for key, value in by_row.items():
        if loss in PAIRED and value in ("fisher", "kfac", "ekfac", "woodbury", "datainf"):
            out.append(
                f"{key}: {value!r}, wanted another beside unlearn.loss {loss}: it takes "
                "gradients row by row, the loss pairs rows"
            )
    chosen = [("select.method", cfg.select.method)]
    chosen += [("eval.baselines", name) for name in cfg.eval.baselines]
    for key, value in chosen:
        if loss in PAIRED and value in BY_ROW:
            out.append(
                f"{key}: {value!r}, wanted another beside unlearn.loss {loss}: it "
                "takes gradients row by row, the loss pairs rows"
            )
    return out
