"""Preference alignment on held-out pairs: margins, and the model's own answers to their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from u2a.batch import Pair, Row
from u2a.evaluate import preference
from u2a.generate import Sampling, sampled_rows
from u2a.metrics import alignment, generation
from u2a.metrics.answers import rouge_l
from u2a.metrics.suites.subject import Findings, Subject
from u2a.objectives import PairSet
from u2a.rewards import rewards


def preference_suite(subject: Subject, held: PairSet) -> Findings:
    """J, margin and order accuracy on pairs; `held` has the adapter-free model's numbers."""
    out = Findings("preference", [p.chosen for p in held.pairs])
    found = preference(
        subject.model, held.pairs, (held.chosen, held.rejected),
        beta=subject.cfg.objective.beta, batch_tokens=subject.batch_tokens,
    )  # fmt: skip
    subject.check(out.rows, (~found.margins.isfinite()).nonzero().flatten())
    out.per_row("objective", found.terms)
    out.per_row("margin", found.margins)
    out.per_row("margin_accuracy", (found.margins > 0).double())
    out.single("order_accuracy", found.order_accuracy)
    return out


@dataclass(frozen=True)
class Answers:
    """To the same prompts: texts, and rewards `[n]` where there is a reward function."""

    texts: list[str]
    reward: Tensor | None

    @classmethod
    def of(cls, subject: Subject, rows: Sequence[Row]) -> Answers:
        reward, tokenizer = subject.judges.reward, subject.tokenizer
        found = None if reward is None else rewards(rows, tokenizer, reward)
        return cls(generation.wanted(tokenizer, rows), found)


def answer_suite(
    subject: Subject, pairs: Sequence[Pair], base: Answers | None = None
) -> tuple[Findings, Answers]:
    """Greedy answers against the chosen ones, and drawn ones: KL to the reference, reward, how
    often they win over those of the `base` model and over the chosen ones."""
    rows = _prompts(pairs)[: subject.cfg.eval.generate]
    out = Findings("answers", rows)
    _greedy(subject, out, rows)
    cfg = subject.cfg
    how = Sampling(max_new_tokens=cfg.eval.max_new_tokens, seed=cfg.run.seed)
    drawn = sampled_rows(subject.model, subject.tokenizer, rows, how, how.seed)
    kept = [r for r in drawn if r.answer_ids]
    if subject.name == "unlearned" and kept:
        out.values["kl_to_reference"] = alignment.kl_to_reference(
            subject.model, kept, subject.batch_tokens
        )
    ours = Answers.of(subject, drawn)
    if ours.reward is not None:
        out.per_row("reward", ours.reward)
    for name, theirs in (("win_rate", base), ("win_rate_chosen", Answers.of(subject, rows))):
        found = None if theirs is None else _verdict(subject, rows, ours, theirs)
        if found is not None:
            out.wins(name, found)
    if subject.show:
        out.texts("drawn", ours.texts)
    return out, ours


def _greedy(subject: Subject, out: Findings, rows: Sequence[Row]) -> None:
    said = subject.written(rows)
    like = rouge_l(generation.wanted(subject.tokenizer, rows), said)
    out.per_row("rougeL_recall", like.recall)
    out.per_row("rougeL_f1", like.f1)
    out.per_row("refusal", alignment.refused(said).double())
    for n in (1, 2):
        if any(len(t.split()) >= n for t in said):
            out.single(f"distinct_{n}", alignment.distinct_n(said, n))
    if subject.show:
        out.texts("generation", said)


def _verdict(
    subject: Subject, rows: Sequence[Row], ours: Answers, theirs: Answers
) -> Tensor | None:
    """By the judge of two answers, else by the reward, else None."""
    compare = subject.judges.compare
    if compare is not None:
        asked = generation.prompts(subject.tokenizer, rows)
        return alignment.verdicts(asked, ours.texts, theirs.texts, compare)
    if ours.reward is None or theirs.reward is None:
        return None
    return alignment.wins(ours.reward, theirs.reward)


def _prompts(pairs: Sequence[Pair]) -> list[Row]:
    """The chosen row of every different prompt."""
    return list({p.chosen.prompt_ids: p.chosen for p in reversed(pairs)}.values())[::-1]
