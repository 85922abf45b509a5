"""Can what was unlearnt be told from what was never seen?"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from u2a.batch import Row
from u2a.metrics import generation, mia
from u2a.metrics.suites.subject import Findings, Subject, summed

K = 0.4


def attack_scores(
    subject: Subject, rows: Sequence[Row], retrained: Tensor | None = None
) -> dict[str, Tensor]:
    """Every attack's score per row `[R]`; `retrained`: NLL/|y| under a model that never saw the
    forget rows, for the reference attack."""
    tokens = subject.tokens(rows)
    loss = mia.loss_score(summed(tokens), tokens.count)
    t = subject.trimmed(tokens, rows)
    texts = generation.wanted(subject.tokenizer, rows)
    out = {
        "mia_loss": loss,
        "mia_zlib": mia.zlib_score(loss, texts),
        "mia_min_k": mia.min_k(t.logp, t.count, K),
        "mia_min_k_plus_plus": mia.min_k_plus_plus(t.logp, t.mean, t.std, t.count, K),
        "mia_gradnorm": mia.gradient_norms(subject.model, rows, subject.batch_tokens),
    }
    if retrained is not None:
        out["mia_reference"] = mia.reference_score(loss, retrained)
    return out


def mean_losses(subject: Subject, rows: Sequence[Row]) -> Tensor:
    return mia.loss_score(*subject.nll(rows))


def min_k_auc(subject: Subject, members: Sequence[Row], holdout: Sequence[Row]) -> float:
    """What PrivLeak is made of."""
    scores = []
    for rows in (members, holdout):
        t = subject.trimmed(subject.tokens(rows), rows)
        scores.append(mia.min_k(t.logp, t.count, K))
    return mia.auc(*scores)


def membership_suite(
    subject: Subject,
    members: Sequence[Row],
    holdout: Sequence[Row],
    retrained: tuple[Tensor, Tensor] | None = None,
) -> tuple[Findings, dict[str, dict[str, Tensor]]]:
    """AUC of every attack, and the scores by attack of "forget" and "holdout". `retrained`: mean
    losses of members and holdout under the retrained model."""
    out = Findings("mia", [*members, *holdout])
    ref = retrained or (None, None)
    inside = attack_scores(subject, members, ref[0])
    outside = attack_scores(subject, holdout, ref[1])
    scores = {}
    for name in inside:
        scores[name] = {"forget": inside[name], "holdout": outside[name]}
        out.single(name, mia.auc(inside[name], outside[name]))
        both = [*inside[name].tolist(), *outside[name].tolist()]
        for sample, value in zip(out.samples, both, strict=True):
            sample[name] = value
    for i, sample in enumerate(out.samples):
        sample["member"] = i < len(members)
    return out, scores
