"""What a loss of the table is: a small function with formula, source, default and test vector.

In formulas lp = log pi(y|x) summed over the |y| answer tokens, lp_t one token's, p = exp(lp_t),
r = the reference model's, y' = the partner answer (alternate, refusal, template), sg = detached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from u2a.batch import AnswerLogps

REFERENCE = "reference"
TOKENS = "reference per token"
PARTNER = "partner"
VOCABULARY = "whole vocabulary"
HIDDEN = "hidden states"
WIRED = frozenset({REFERENCE, TOKENS, PARTNER})


@dataclass(frozen=True)
class Vector:
    """A test vector: what goes in, the value that must come out, and the slope by `logp[0]`.

    `logp`, `ref` are per token of the answer, `partner`, `partner_ref` those of y'. A loss over
    the whole vocabulary has `logits`, `target` and `ref_logits` of one token instead; one over
    hidden states has `hidden` and `ref_hidden`. `settings` go to `get_loss`.
    """

    value: float
    logp: tuple[float, ...] = ()
    slope: float | None = None
    ref: tuple[float, ...] | None = None
    partner: tuple[float, ...] | None = None
    partner_ref: tuple[float, ...] | None = None
    logits: tuple[float, ...] = ()
    target: int = 0
    ref_logits: tuple[float, ...] | None = None
    hidden: tuple[float, ...] = ()
    ref_hidden: tuple[float, ...] = ()
    settings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """`loss(lp) -> [B]`, one value per example, minimised by unlearning.

    With a partner the batch holds P answers, then their P partners, and the result is `[P]`.
    `beta` is the value in use (None: the loss has none), `options` further numbers by name;
    `retain_weight` is the customary weight of the retain term. `needs` says what the function must
    be given beside the log-probabilities.

    A loss published as "detached weight times log-probability" is here the integral of that field:
    the same gradient, and a value and Hessian that belong to it, as line searches and
    Hessian-vector products want. `published` gives the published number. Where no integral is known
    (`exact` False) the value is the published one and only the derivatives belong together.
    """

    name: str
    formula: str
    source: str
    fn: Callable[..., Tensor]
    vector: Any
    beta: float | None = None
    needs: frozenset[str] = frozenset()
    retain_weight: float = 0.0
    options: Mapping[str, float] = field(default_factory=dict)
    surrogate: Callable[..., Tensor] | None = None
    exact: bool = True

    @property
    def needs_reference(self) -> bool:
        return bool(self.needs & {REFERENCE, TOKENS})

    @property
    def wired(self) -> bool:
        """Whether the gains, solvers and the trainer can use it (the others: see `needs`)."""
        return self.needs <= WIRED

    def _call(self, fn: Callable[..., Tensor], *given: Any) -> Tensor:
        return fn(*given, 0.0 if self.beta is None else self.beta, **self.options)

    def __call__(self, lp: AnswerLogps) -> Tensor:
        if not self.wired:
            raise ValueError(f"{self.name}: needs {', '.join(sorted(self.needs))}; see its `fn`")
        return self._call(self.fn, lp)

    def published(self, lp: AnswerLogps) -> Tensor:
        """The published value: differs from the loss by what has no gradient."""
        return self._call(self.surrogate or self.fn, lp)

    def with_settings(self, beta: float | None, options: Mapping[str, float]) -> Loss:
        """Raises ValueError for beta <= 0 and for options the loss does not have."""
        odd = sorted(options.keys() - self.options.keys())
        if odd:
            has = ", ".join(self.options) or "none"
            raise ValueError(f"{self.name}: no option {odd[0]!r}, wanted one of: {has}")
        out = replace(self, options={**self.options, **options}) if options else self
        if self.beta is None or beta is None:
            return out
        if not beta > 0:
            raise ValueError(f"{self.name}: beta must be > 0, got {beta}")
        return replace(out, beta=float(beta))


def refuse_partner(loss: object, who: str) -> None:
    """Raises ValueError for a loss on answers and partners: `who` takes rows one by one."""
    if PARTNER in getattr(loss, "needs", ()):
        raise ValueError(
            f"{who}: loss {getattr(loss, 'name', loss)} pairs rows with partners; "
            "wanted one of single rows"
        )


def reference(lp: AnswerLogps, name: str) -> Tensor:
    """Summed reference log-probabilities `[B]`."""
    if lp.ref is None:
        raise ValueError(f"{name}: lp.ref must hold reference log-probabilities [B], got None")
    ref = lp.ref.to(lp.logp)
    return ref if ref.ndim == 1 else ref.sum(1)


def token_reference(lp: AnswerLogps, name: str) -> Tensor:
    """Reference log-probability of every token, `[n]`."""
    if lp.ref is None or lp.ref.ndim != 2:
        got = None if lp.ref is None else list(lp.ref.shape)
        raise ValueError(
            f"{name}: lp.ref must hold reference log-probs per token [B, L], got {got}"
        )
    return lp.ref.to(lp.logp)[lp.row, lp.position()]


def token_mean(lp: AnswerLogps, values: Tensor) -> Tensor:
    """Mean of `values [n]` over each example's tokens, `[B]`."""
    return lp.with_logp(values).mean()
