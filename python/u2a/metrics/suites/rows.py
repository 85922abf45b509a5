"""What a model still knows of forget rows, and of retained ones."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from u2a.batch import Row
from u2a.metrics import alignment, generation
from u2a.metrics.answers import probability, rouge_l
from u2a.metrics.estimate import same_distribution
from u2a.metrics.memorisation import exact_memorisation, extraction_strength
from u2a.metrics.suites.subject import Findings, Subject, pooled_perplexity, summed


def row_suite(
    subject: Subject, task: str, rows: Sequence[Row], sound: Tensor | None = None
) -> Findings:
    """Perplexity, probability, memorisation and, where answers are generated, ROUGE-L and
    refusals: on "forget" those who got an answer (attack_success), else over_refusal. `sound`:
    P(sound) of a retrained model's answers to the same rows, for cleanness_indistinguishability."""
    out = Findings(task, rows)
    tokens = subject.tokens(rows)
    nll = summed(tokens)
    out.single("perplexity", pooled_perplexity(nll, tokens.count))
    out.per_row("nll", nll / tokens.count)
    out.per_row("prob", probability(nll, tokens.count))
    known = subject.trimmed(tokens, rows)
    out.per_row("exact_memorisation", exact_memorisation(known.hit, known.count))
    out.per_row("extraction_strength", extraction_strength(known.hit, known.count))
    asked = rows[: subject.cfg.eval.generate]
    if asked:
        _generated(subject, out, asked, sound)
    return out


def _generated(subject: Subject, out: Findings, rows: Sequence[Row], sound: Tensor | None) -> None:
    wanted = generation.wanted(subject.tokenizer, rows)
    said = subject.written(rows)
    like = rouge_l(wanted, said)
    out.per_row("rougeL_recall", like.recall)
    out.per_row("rougeL_f1", like.f1)
    if out.task == "forget":
        asked = generation.prompts(subject.tokenizer, rows)
        judge = subject.judges.judge
        out.per_row("attack_success", alignment.attack_success(asked, said, judge))
    else:
        out.per_row("over_refusal", alignment.refused(said).double())
    if subject.judges.classifier is not None:
        ours = alignment.clean(said, subject.judges.classifier)
        out.per_row("cleanness", ours)
        if sound is not None:
            out.single("cleanness_indistinguishability", same_distribution(ours, sound), len(ours))
    if subject.show:
        out.texts("generation", said)
