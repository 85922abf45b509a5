"""Preference alignment on held-out pairs: margins, and the model's own answers to their prompts."""

from __future__ import annotations

from collections.abc import Sequence

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


def answer_suite(subject: Subject, pairs: Sequence[Pair]) -> Findings:
    """Greedy answers against the chosen ones, and sampled ones: KL to the reference, reward."""
    rows = _prompts(pairs)[: subject.cfg.eval.generate]
    out = Findings("answers", rows)
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
    cfg = subject.cfg
    how = Sampling(max_new_tokens=cfg.eval.max_new_tokens, seed=cfg.run.seed)
    drawn = sampled_rows(subject.model, subject.tokenizer, rows, how, how.seed)
    kept = [r for r in drawn if r.answer_ids]
    if subject.name == "unlearned" and kept:
        out.values["kl_to_reference"] = alignment.kl_to_reference(
            subject.model, kept, subject.batch_tokens
        )
    if subject.judges.reward is not None:
        out.per_row("reward", rewards(drawn, subject.tokenizer, subject.judges.reward))
    return out


def _prompts(pairs: Sequence[Pair]) -> list[Row]:
    """The chosen row of every different prompt."""
    return list({p.chosen.prompt_ids: p.chosen for p in reversed(pairs)}.values())[::-1]
