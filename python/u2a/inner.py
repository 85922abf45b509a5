"""The inner problem of bi-level unlearning and its exact solution by L-BFGS.

F(theta, w) = sum_i w_i l_i(theta) + mu R(theta) + lambda/2 ||theta - theta_0||^2
R is the pooled retain NLL, sum NLL / sum tokens (the log of the retain perplexity); theta runs over
the trainable parameters. `U2ATrainer` and `inner_solve` minimise this one object.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from u2a.adapter import (
    distance,
    evaluating,
    reference_logps,
    restore,
    snapshot,
)
from u2a.batch import Batch, Pair, Row, pair_batches, row_batches
from u2a.errors import GuardError
from u2a.losses import LOSSES, Loss
from u2a.losses.base import PARTNER, TOKENS
from u2a.products import answer_logps
from u2a.tree import trainable


@dataclass(frozen=True)
class Part:
    """One padded batch of one term: it adds sum_b coef[b] loss(batch)[b] to F (coef float64)."""

    batch: Batch
    coef: Tensor
    loss: Loss
    uids: tuple[str, ...]
    ref: Tensor | None = None

    def scaled(self, factor: float) -> Part:
        return replace(self, coef=self.coef * factor)

    def value(self, model: nn.Module) -> Tensor:
        """The part's share of F, a scalar with graph. Raises GuardError when it is not finite."""
        losses = self.loss(answer_logps(model, self.batch, ref=self.ref))
        total = torch.dot(self.coef.to(losses.device), losses.double())
        if not math.isfinite(total.item()):
            bad = (~losses.isfinite()).nonzero().flatten().tolist() or range(len(self.uids))
            uids = ", ".join(self.uids[i] for i in bad[:3])
            raise GuardError(f"{self.loss.name} loss is not finite on {len(bad)} rows: uid {uids}")
        return total


@dataclass(frozen=True)
class InnerProblem:
    """Forget rows with weights `[n]` (>= 0, summing to the total the caller wants), retain rows,
    mu (`retain_weight`), lambda (`anchor`), theta_0 (`start`, a `snapshot`), loss; `partners`, one
    per forget row, where the loss wants an alternate answer; and reference log-probabilities `[n]`
    (`[n, L]` per token, `[2n]` with the partners' after the rows') where it needs them.

    Rows of weight 0 cost nothing. Make one with `InnerProblem.build`.
    """

    forget: Sequence[Row]
    weights: Tensor
    loss: Loss
    start: dict[str, Tensor]
    retain: Sequence[Row] = ()
    retain_weight: float = 0.0
    anchor: float = 0.0
    reference: Tensor | None = None
    partners: Sequence[Row] = ()
    batch_tokens: int = 8192
    retain_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        w, n = self.weights, len(self.forget)
        if w.shape != (n,):
            raise ValueError(f"weights: wanted one per forget row, [{n}]; got {list(w.shape)}")
        bad = (~(w.isfinite() & (w >= 0))).nonzero().flatten().tolist()
        if bad:
            row = self.forget[bad[0]]
            raise ValueError(
                f"weights: wanted finite and >= 0, got {w[bad[0]].item()} at row {bad[0]} "
                f"(uid {row.uid}) and {len(bad) - 1} more"
            )
        self._check_needs(n)
        for key in ("retain_weight", "anchor"):
            if not (math.isfinite(getattr(self, key)) and getattr(self, key) >= 0):
                raise ValueError(f"{key}: wanted finite and >= 0, got {getattr(self, key)}")
        if self.retain_weight > 0 and not self.retain:
            raise ValueError(f"retain: no rows, but retain_weight is {self.retain_weight}")
        tokens = sum(max(len(r) - max(len(r.prompt_ids), 1), 0) for r in self.retain)
        if self.retain and not tokens:
            raise ValueError(f"retain: {len(self.retain)} rows hold no answer token")
        object.__setattr__(self, "retain_tokens", tokens)

    def _check_needs(self, n: int) -> None:
        name, needs, ref = self.loss.name, self.loss.needs, self.reference
        if not self.loss.wired:
            raise ValueError(f"loss: {name} needs {', '.join(sorted(needs))}, which rows lack")
        wanted = n if PARTNER in needs else 0
        if len(self.partners) != wanted:
            raise ValueError(
                f"partners: loss {name} wants {wanted or 'none'} (one per forget row where it has "
                f"any), got {len(self.partners)}"
            )
        if self.loss.needs_reference:
            rows = n + wanted
            words = f"[{rows}, L]" if TOKENS in needs else f"[{rows}]"
            got = None if ref is None else list(ref.shape)
            if ref is None or len(ref) != rows or ref.ndim != 1 + (TOKENS in needs):
                raise ValueError(f"reference: loss {name} wants log-probs {words}, got {got}")

    @classmethod
    def build(
        cls,
        model: nn.Module,
        forget: Sequence[Row],
        weights: Tensor,
        loss: Loss,
        *,
        reference_model: nn.Module | None = None,
        **settings: Any,
    ) -> InnerProblem:
        """Takes theta_0 from the model as it is now and computes the reference if one is needed."""
        batch_tokens = settings.get("batch_tokens", 8192)
        if loss.needs_reference and settings.get("reference") is None:
            settings["reference"] = reference_logps(
                model, [*forget, *settings.get("partners", ())], batch_tokens,
                reference_model=reference_model, per_token=TOKENS in loss.needs,
            )  # fmt: skip
        settings.setdefault("start", snapshot(model))
        return cls(forget=forget, weights=weights.detach().clone(), loss=loss, **settings)

    def with_weights(self, weights: Tensor) -> InnerProblem:
        return replace(self, weights=weights.detach().clone())

    @property
    def support(self) -> list[int]:
        """Forget rows of positive weight."""
        return self.weights.nonzero().flatten().tolist()

    def forget_parts(self, index: Sequence[int] | None = None) -> list[Part]:
        """Batches of the forget rows `index` (default: all of positive weight); coef = w_i."""
        out = []
        for b in self.batches(self.support if index is None else index):
            ref = self.reference
            ref = None if ref is None else ref[b.index.to(ref.device)]
            rows = b.index[: len(b) // 2 if self.partners else len(b)]
            coef = self.weights[rows.to(self.weights.device)].double()
            uids = tuple(self.forget[i].uid for i in rows.tolist())
            out.append(Part(b, coef, self.loss, uids, ref))
        return out

    def batches(self, index: Sequence[int] | None = None) -> list[Batch]:
        """The forget rows `index` (default: all), P of them then their P partners if there are any.

        `Batch.index` are row numbers, n more for a partner: they look up `weights` and `reference`.
        """
        n = len(self.forget)
        at = list(range(n)) if index is None else list(index)
        if not self.partners:
            found = row_batches([self.forget[i] for i in at], self.batch_tokens)
            return [replace(b, index=torch.tensor(at)[b.index]) for b in found]
        pairs = [Pair("", self.forget[i], self.partners[i]) for i in at]
        found = pair_batches(pairs, self.batch_tokens)
        shift = [torch.tensor([0, n]).repeat_interleave(len(b) // 2) for b in found]
        return [
            replace(b, index=torch.tensor(at)[b.index] + s)
            for b, s in zip(found, shift, strict=True)
        ]

    def retain_parts(self, index: Sequence[int] | None = None) -> list[Part]:
        """Batches of the retain rows `index` (default: all); coef = mu |y| / sum of all |y|."""
        index = list(range(len(self.retain))) if index is None else list(index)
        if not self.retain_weight or not index:
            return []
        out = []
        for b in row_batches([self.retain[i] for i in index], self.batch_tokens):
            coef = b.answer.sum(1).double() * (self.retain_weight / self.retain_tokens)
            at = torch.tensor(index)[b.index]
            uids = tuple(self.retain[i].uid for i in at.tolist())
            out.append(Part(replace(b, index=at), coef, LOSSES["nll"], uids))
        return out

    def parts(self) -> list[Part]:
        """All of F but the anchor."""
        return self.forget_parts() + self.retain_parts()

    def anchor_value(self, model: nn.Module) -> Tensor:
        """lambda/2 ||theta - theta_0||^2 with graph."""
        params = trainable(model)
        total = sum(((p - self.start[n].to(p)) ** 2).sum() for n, p in params.items())
        return 0.5 * self.anchor * total  # type: ignore[return-value]

    def distance(self, model: nn.Module) -> float:
        """||theta - theta_0||."""
        return distance(model, self.start)

    def value(self, model: nn.Module, parts: Iterable[Part] | None = None) -> float:
        """F(theta, w) without gradient."""
        with evaluating(model):
            parts = self.parts() if parts is None else parts
            total = sum(part.value(model).double() for part in parts)
            return float(total + self.anchor_value(model).double())

    def loss_and_grad(self, model: nn.Module, parts: Iterable[Part] | None = None) -> float:
        """F(theta, w); its gradient is added to `.grad`, one batch's graph alive at a time."""
        total = 0.0
        for part in self.parts() if parts is None else parts:
            value = part.value(model)
            total += value.item()
            value.backward()
        if self.anchor:
            value = self.anchor_value(model)
            total += value.item()
            value.backward()
        return total


@dataclass(frozen=True)
class InnerResult:
    """`grad_max` = max |grad F| at the returned theta: the inner sub-optimality to report."""

    value: float
    grad_max: float
    evaluations: int
    converged: bool


def inner_solve(
    model: nn.Module, problem: InnerProblem, tol: float = 1e-6, max_iter: int = 200
) -> InnerResult:
    """Full-batch L-BFGS (strong Wolfe) on F from the model's present parameters (warm start).

    Stops when max |grad F| <= tol (absolute; F is in nats), when F or theta change by less than the
    parameters' machine epsilon, or after `max_iter` iterations (GA with a small anchor is unbounded
    and gets there): look at `converged` and `grad_max`. Runs in eval mode, without dropout. Raises
    GuardError on a non-finite value, the parameters put back as they were.
    """
    params = list(trainable(model).values())
    before, mode, parts = snapshot(model), model.training, problem.parts()
    optimizer = torch.optim.LBFGS(
        params,
        max_iter=max_iter,
        max_eval=2 * max_iter,
        history_size=20,
        tolerance_grad=tol,
        tolerance_change=torch.finfo(params[0].dtype).eps,
        line_search_fn="strong_wolfe",
    )
    evaluations = 0

    def closure() -> float:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        value = problem.loss_and_grad(model, parts)
        if not all(p.grad.isfinite().all() for p in params if p.grad is not None):
            raise GuardError(f"gradient of F is not finite at evaluation {evaluations}")
        return value

    model.eval()
    try:
        optimizer.step(closure)
        value = closure()
    except GuardError:
        restore(model, before)
        raise
    finally:
        model.train(mode)
        grad_max = _largest(params)
        optimizer.zero_grad()
    return InnerResult(value, grad_max, evaluations, grad_max <= tol)


def sub_optimality(model: nn.Module, problem: InnerProblem) -> float:
    """max |grad F| at the model's present parameters, 0 at the optimum: one full gradient."""
    params = list(trainable(model).values())
    with evaluating(model), torch.enable_grad():
        problem.loss_and_grad(model)
    found = _largest(params)
    for p in params:
        p.grad = None
    return found


def _largest(params: Iterable[Tensor]) -> float:
    return max((float(p.grad.abs().max()) for p in params if p.grad is not None), default=0.0)
