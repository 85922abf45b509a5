"""Stops an unlearning run that eats the rest of the model, and keeps the last good adapter.

Two bands on retain rows: the exact token KL(pi_ref || pi), and the ratio of pooled perplexities.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from u2a.adapter import adapter_disabled, device_of, evaluating, restore, snapshot
from u2a.batch import Row, row_batches
from u2a.errors import GuardError
from u2a.tree import trainable


@dataclass(frozen=True)
class Reading:
    """`kl`: mean over retain answer tokens of KL(pi_ref(.|context) || pi(.|context)) over the whole
    vocabulary, nats per token. `ppl_ratio`: pooled perplexity over the reference's."""

    kl: float
    ppl_ratio: float
    step: int = 0


@dataclass(frozen=True)
class Trip:
    """Why and where a guard stopped the run."""

    step: int
    reason: str


class RetainGuard:
    """Reads a model on up to `max_rows` evenly spaced retain rows against its reference.

    The reference is the adapter-free model, or `reference_model`. `batch_tokens` bounds the two
    [tokens, vocabulary] logit tensors held at a time. Raises ValueError without rows.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        max_kl: float = 2.0,
        max_ppl_ratio: float = 1.3,
        max_rows: int = 64,
        batch_tokens: int = 1024,
        reference_model: nn.Module | None = None,
    ) -> None:
        if not rows:
            raise ValueError("RetainGuard: rows must hold at least one retain Row, got none")
        count = min(len(rows), max_rows)
        picked = [rows[i * len(rows) // count] for i in range(count)]
        self.batches = row_batches(picked, batch_tokens)
        self.max_kl, self.max_ppl_ratio = max_kl, max_ppl_ratio
        self.reference_model = reference_model

    def read(self, model: nn.Module, step: int = 0) -> Reading:
        """Two forward passes over the guard rows, without gradient."""
        kl, gap, tokens = 0.0, 0.0, 0
        for batch in self.batches:
            batch = batch.to(device_of(model))
            target = batch.ids[:, 1:][batch.answer[:, 1:]]
            now = _answer_logits(model, batch.ids, batch.answer)
            with self._reference(model) as reference:
                ref = _answer_logits(reference, batch.ids, batch.answer).to(now)
            kl += float(F.kl_div(now, ref, log_target=True, reduction="sum"))
            gap += float((ref - now).gather(1, target[:, None]).sum())
            tokens += len(target)
        if not tokens:
            raise ValueError("RetainGuard: the retain rows hold no answer token")
        mean = gap / tokens
        return Reading(kl / tokens, math.exp(mean) if mean < 700 else math.inf, step)

    def fault(self, reading: Reading) -> str | None:
        """The band that was left, in words, or None. NaN is outside every band."""
        if not reading.kl <= self.max_kl:
            return f"retain token KL {reading.kl:.4g} is over {self.max_kl:g} nats"
        if not reading.ppl_ratio <= self.max_ppl_ratio:
            return f"retain perplexity ratio {reading.ppl_ratio:.4g} is over {self.max_ppl_ratio:g}"
        return None

    def _reference(self, model: nn.Module) -> contextlib.AbstractContextManager[nn.Module]:
        if self.reference_model is not None:
            return contextlib.nullcontext(self.reference_model)
        return adapter_disabled(model)


def _answer_logits(model: nn.Module, ids: Tensor, answer: Tensor) -> Tensor:
    with evaluating(model):
        logits = model(input_ids=ids).logits[:, :-1][answer[:, 1:]]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


class GuardCallback(TrainerCallback):
    """Reads `guard` after step 1, then every `every` steps and at the end of training.

    On a trip the last good parameters come back, `trip` says why, and training stops;
    `on_trip="fail"` also raises GuardError. `readings` holds the whole curve.
    """

    def __init__(
        self, guard: RetainGuard, every: int = 10, on_trip: str = "stop-keep-last-good"
    ) -> None:
        if on_trip not in ("stop-keep-last-good", "fail"):
            raise ValueError(f"on_trip: wanted 'stop-keep-last-good' or 'fail', got {on_trip!r}")
        self.guard, self.every, self.on_trip = guard, every, on_trip
        self.trip: Trip | None = None
        self.readings: list[Reading] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self.first = state.global_step + 1
        self._check(kwargs["model"], state, control)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        step, last = state.global_step, state.global_step >= state.max_steps
        if step == self.first or step % self.every == 0 or last:
            self._check(kwargs["model"], state, control)

    def _check(self, model: nn.Module, state: TrainerState, control: TrainerControl) -> None:
        reading = self.guard.read(model, state.global_step)
        self.readings.append(reading)
        reason = self.guard.fault(reading)
        if reason is None:
            self.good = snapshot(model)
            return
        if not hasattr(self, "good"):
            raise GuardError(f"guard: before the first step {reason}; nothing good to go back to")
        restore(model, self.good)
        self.trip = Trip(state.global_step, reason)
        control.should_training_stop = True
        if self.on_trip == "fail":
            raise GuardError(f"guard: step {state.global_step}: {reason}; last good adapter kept")


class StepCheck(TrainerCallback):
    """No step on a non-finite gradient, none on a first gradient that is zero throughout."""

    def __init__(self) -> None:
        self.seen = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        params = trainable(kwargs["model"])
        size = sum(
            float(p.grad.double().square().sum()) for p in params.values() if p.grad is not None
        )
        if not math.isfinite(size):
            raise GuardError(f"gradient is not finite at step {state.global_step + 1}; not applied")
        if not self.seen and size == 0:
            raise GuardError(
                f"no gradient reached the {len(params)} trainable tensors at the first step "
                "(frozen adapter, or checkpointing without input gradients)"
            )
        self.seen = True
