"""Weighted unlearning as a transformers.Trainer: unbiased minibatch steps on `InnerProblem`.

A step that saw S_f of n_f forget and S_r of n_r retain rows, over all its micro-batches, descends
n_f/S_f sum w_i l_i + n_r/S_r (its share of mu R) + lambda/2 ||theta - theta_0||^2: on average F,
and the same however accumulation and `batch_tokens` split it. Weights are never re-normalised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from u2a.adapter import distance, reference_logps, restore, sequence_logps, snapshot
from u2a.batch import Row
from u2a.errors import GuardError
from u2a.guard import GuardCallback, RetainGuard, StepCheck
from u2a.harmony import Harmony
from u2a.inner import InnerProblem, InnerResult, Part, inner_solve
from u2a.losses import get_loss
from u2a.strata import Strata
from u2a.trainer_config import U2AConfig, one_device
from u2a.tree import trainable

__all__ = [
    "InnerProblem",
    "InnerResult",
    "U2AConfig",
    "U2ATrainer",
    "inner_solve",
    "reference_logps",
]


class U2ATrainer(Trainer):
    """Minimises F(theta, w) over the trainable parameters.

    Either `train_dataset` (forget rows) with `weights` [n] (None: 1/n each), `retain_dataset` and
    `reference` [n] (None: adapter disabled, computed once); or a `problem`, whose theta_0, weights
    and retain weight then hold (the loss, beta, anchor of `args` are not looked at).

    `train` raises GuardError (exit 6) on a non-finite loss or gradient, on an adapter without
    gradient, and when the run had no effect; a tripped guard is in `guard_callback.trip`. In every
    case the last good parameters are in the model. One process and one device; others refused.
    """

    args: U2AConfig
    model: Any
    optimizer: Any
    problem: InnerProblem

    def __init__(
        self,
        model: nn.Module,
        args: U2AConfig,
        train_dataset: Sequence[Row] | None = None,
        *,
        weights: Tensor | None = None,
        retain_dataset: Sequence[Row] = (),
        reference: Tensor | None = None,
        reference_model: nn.Module | None = None,
        problem: InnerProblem | None = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        one_device(args)
        super().__init__(
            model=model,
            args=args,
            data_collator=self._collate,
            processing_class=processing_class,
            callbacks=[StepCheck(), *(callbacks or [])],
            optimizers=optimizers,
        )
        if args.gradient_checkpointing:
            self.model.enable_input_require_grads()
        if problem is None:
            rows = list(train_dataset or ())
            problem = self._build(rows, weights, retain_dataset, reference, reference_model)
        elif train_dataset is not None or weights is not None or retain_dataset:
            raise ValueError("U2ATrainer: give problem, or datasets and weights, not both")
        if not problem.support:
            raise ValueError(f"weights: all {len(problem.forget)} are zero, nothing to unlearn")
        self.problem = problem
        self.train_dataset = problem.forget
        self.harmony = self._harmony() if args.harmonise else None
        self.guard_callback: GuardCallback | None = None
        if args.guard and problem.retain:
            self._add_guard(reference_model)

    def _build(
        self,
        rows: list[Row],
        weights: Tensor | None,
        retain: Sequence[Row],
        reference: Tensor | None,
        reference_model: nn.Module | None,
    ) -> InnerProblem:
        args, loss = self.args, get_loss(self.args.loss, self.args.beta)
        mu = loss.retain_weight if args.retain_weight is None else args.retain_weight
        return InnerProblem.build(
            self.model,
            rows,
            torch.full((len(rows),), 1 / max(len(rows), 1)) if weights is None else weights,
            loss,
            reference_model=reference_model,
            reference=reference,
            retain=retain,
            retain_weight=mu,
            anchor=args.anchor,
            batch_tokens=args.batch_tokens,
        )

    def _harmony(self) -> Harmony:
        if not (self.problem.retain and self.problem.retain_weight):
            raise ValueError("harmonise: wanted retain rows of positive weight, got none")
        return Harmony(trainable(self.model))

    def _add_guard(self, reference_model: nn.Module | None) -> None:
        args = self.args
        guard = RetainGuard(
            self.problem.retain,
            max_kl=args.max_kl,
            max_ppl_ratio=args.max_retain_ppl_ratio,
            batch_tokens=min(args.batch_tokens, 1024),
            reference_model=reference_model,
        )
        self.guard_callback = GuardCallback(guard, args.guard_every, args.on_trip)
        self.add_callback(self.guard_callback)

    def get_train_dataloader(self) -> DataLoader:
        """Micro-steps over the forget rows of positive weight; needs no accelerate wrapping."""
        problem, args = self.problem, self.args
        retain = len(problem.retain) if problem.retain_weight else 0
        rows = args.per_device_train_batch_size
        strata = Strata(
            (len(problem.support), retain),
            (rows, args.retain_batch_size or rows),
            args.seed if args.data_seed is None else args.data_seed,
        )
        steps = -(-len(strata) // args.gradient_accumulation_steps)
        strata.epoch = lambda: self.state.global_step // steps
        return DataLoader(
            range(strata.n_f + strata.n_r),  # type: ignore[arg-type]
            batch_sampler=strata,
            collate_fn=self._collate,
            num_workers=args.dataloader_num_workers,
        )

    def _collate(self, index: list[int]) -> dict[str, list[Part]]:
        support = self.problem.support
        n = len(support)
        return {
            "forget": self.problem.forget_parts([support[i] for i in index if i < n]),
            "retain": self.problem.retain_parts([i - n for i in index if i >= n]),
        }

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The step's micro-batches, and its row counts in place of the token count."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return samples, self._counts(samples)

    def _counts(self, samples: list[dict[str, list[Part]]]) -> dict[str, int]:
        rows = {k: sum(len(p.coef) for s in samples for p in s[k]) for k in ("forget", "retain")}
        return rows | {"micro": len(samples)}

    def _terms(
        self, inputs: dict[str, list[Part]], counts: dict[str, int]
    ) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """The micro-step's share of the step's loss, in pieces to be evaluated one at a time, by
        what they are for."""
        sizes = {"forget": len(self.problem.support), "retain": len(self.problem.retain)}
        for kind, size in sizes.items():
            for part in inputs[kind]:
                scaled = part.scaled(size / counts[kind])
                yield kind, lambda part=scaled: part.value(self.model)  # type: ignore[misc]
        if self.problem.anchor:
            yield "anchor", lambda: self.problem.anchor_value(self.model) / counts["micro"]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Backward piece by piece; returns the micro-step's share of the step's loss."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        total = torch.zeros((), device=self.args.device)
        for kind, term in self._terms(inputs, num_items_in_batch or self._counts([inputs])):
            with self.accelerator.autocast():
                value = term()
            harmony = self.harmony if kind == "forget" else None
            with harmony.forgetting() if harmony else nullcontext():
                self.accelerator.backward(value)
            total += value.detach()
        if self.harmony and self.accelerator.sync_gradients:
            self.harmony.join()
        return total

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The same loss as one scalar with graph."""
        terms = self._terms(inputs, num_items_in_batch or self._counts([inputs]))
        loss = torch.stack([term() for _, term in terms]).sum()
        return (loss, None) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """transformers' estimate, summed over the parts."""
        parts = inputs["forget"] + inputs["retain"]
        count = super().floating_point_ops
        return sum(count({"input_ids": part.batch.ids}) for part in parts)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer.train; see the class for what it raises."""
        watched = [self.problem.forget[i] for i in self.problem.support[:64]]
        begin = snapshot(self.model)
        before = sequence_logps(self.model, watched, self.problem.batch_tokens)
        try:
            output = super().train(*args, **kwargs)
        except GuardError:
            restore(self.model, getattr(self.guard_callback, "good", begin))
            self.is_in_train = False
            raise
        if self.guard_callback is None or self.guard_callback.trip is None:
            after = sequence_logps(self.model, watched, self.problem.batch_tokens)
            if distance(self.model, begin) == 0:
                raise GuardError(f"no effect: no parameter moved in {output.global_step} steps")
            if torch.equal(before, after):
                raise GuardError("no effect: the forget log-probabilities did not change")
        return output
