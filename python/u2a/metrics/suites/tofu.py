"""TOFU on one model: OpenUnlearning's entries {metric: {agg_value, value_by_index}}."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from u2a.batch import Row
from u2a.metrics import generation, tofu
from u2a.metrics.answers import probability, probability_with_options, rouge_l
from u2a.metrics.estimate import mean
from u2a.metrics.memorisation import exact_memorisation, extraction_strength
from u2a.metrics.suites.questions import Question, right_rows
from u2a.metrics.suites.subject import Entries, Subject

PREFIX = {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}
PARAPHRASED = ("forget", "retain")
MEANS: dict[str, tofu.Mean] = {"": "geometric", "_arithmetic": "arithmetic"}
"""Of the wrong answers' probabilities in the truth ratio, by the ending of the metric's name."""


def entry(value: float, *, by_index: Sequence[Any] | None = None) -> dict[str, Any]:
    """One metric as OpenUnlearning writes it."""
    found: dict[str, Any] = {"agg_value": value}
    if by_index is not None:
        found["value_by_index"] = {str(i): v for i, v in enumerate(by_index)}
    return found


def scores(name: str, values: Tensor, aggregate: Tensor | None = None) -> Entries:
    by_index = [{"score": v} for v in values.tolist()]
    each = values if aggregate is None else aggregate
    return {name: entry(mean(each).value, by_index=by_index)}


def tofu_suite(subject: Subject, sets: Mapping[str, Sequence[Question]]) -> Entries:
    """Every number that needs this model only; `sets` by `PREFIX`'s names."""
    out: Entries = {}
    for name, questions in sets.items():
        out |= _one_set(subject, name, questions)
    if "forget" in sets:
        rows = right_rows(sets["forget"])
        known = subject.trimmed(subject.tokens(rows), rows)
        out |= scores("exact_memorization", exact_memorisation(known.hit, known.count))
        out |= scores("extraction_strength", extraction_strength(known.hit, known.count))
    if set(tofu.UTILITY) <= set(out):
        for suffix in MEANS:
            of = {n: n + suffix if n.endswith("Truth_Ratio") else n for n in tofu.UTILITY}
            nine = {name: float(out[key]["agg_value"]) for name, key in of.items()}
            out[f"model_utility{suffix}"] = entry(tofu.model_utility(nine))
    return out


def _one_set(subject: Subject, name: str, questions: Sequence[Question]) -> Entries:
    short, rows = PREFIX[name], right_rows(questions)
    prob, loss = _probability(subject, rows)
    out: Entries = {f"{short}_Q_A_Prob": _prob_entry(prob.tolist(), loss.tolist())}
    out |= _rouge(subject, f"{short}_Q_A_ROUGE", rows)
    sizes = [len(q.wrong) for q in questions]
    wrong_prob, wrong_loss = _probability(subject, [w for q in questions for w in q.wrong])
    wrong = wrong_prob.split(sizes)
    losses = wrong_loss.split(sizes)
    lists = [t.tolist() for t in wrong], [t.tolist() for t in losses]
    out[f"{short}_Q_A_PERT_Prob"] = _prob_entry(*lists)
    right_loss = loss
    if name in PARAPHRASED:
        paraphrases = [q.paraphrase for q in questions if q.paraphrase is not None]
        para, right_loss = _probability(subject, paraphrases)
        out[f"{short}_Q_A_PARA_Prob"] = _prob_entry(para.tolist(), right_loss.tolist())
    else:
        share = probability_with_options(prob, wrong)
        by_index = [{"prob": p} for p in share.tolist()]
        out[f"{short}_Q_A_Prob_normalised"] = entry(mean(share).value, by_index=by_index)
    for suffix, ratio in _log_ratios(right_loss, losses).items():
        if name == "forget":
            found = f"forget_truth_ratio{suffix}", ratio.exp(), tofu.closer_to_one(ratio)
        else:
            found = f"{short}_Truth_Ratio{suffix}", ratio.exp(), tofu.truth_preferred(ratio)
        out |= scores(*found)
    return out


def _log_ratios(right: Tensor, wrong: Sequence[Tensor]) -> dict[str, Tensor]:
    """log TR `[R]` by `MEANS`, of NLL/|y|."""
    return {
        suffix: tofu.log_truth_ratio(-right, [-x for x in wrong], mean)
        for suffix, mean in MEANS.items()
    }


def truth_ratios(subject: Subject, questions: Sequence[Question]) -> dict[str, Tensor]:
    """log TR `[R]` on the forget set by `MEANS`, all that forget quality needs of the retrained
    model."""
    sizes = [len(q.wrong) for q in questions]
    _, wrong = _probability(subject, [w for q in questions for w in q.wrong])
    _, right = _probability(subject, [q.paraphrase for q in questions if q.paraphrase is not None])
    return _log_ratios(right, wrong.split(sizes))


def qualities(entries: Entries, retrained: Mapping[str, Tensor]) -> Entries:
    """Forget quality by every mean whose ratios are known of the retrained model; `entries` are
    this model's, in whose losses its ratios are."""
    right, wrong = (
        entries[f"forget_Q_A_{kind}_Prob"]["value_by_index"].values() for kind in ("PARA", "PERT")
    )
    ours = _log_ratios(
        torch.tensor([x["avg_loss"] for x in right], dtype=torch.float64),
        [torch.tensor(x["avg_loss"], dtype=torch.float64) for x in wrong],
    )
    return {
        f"forget_quality{suffix}": entry(tofu.forget_quality(ours[suffix], theirs))
        for suffix, theirs in retrained.items()
    }


def _probability(subject: Subject, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """(exp(-NLL/|y|), NLL/|y|) `[R]`."""
    nll, count = subject.nll(rows)
    return probability(nll, count), nll / count


def _prob_entry(prob: Sequence[Any], loss: Sequence[Any]) -> dict[str, Any]:
    """The aggregate is over rows, of a row's mean where it has several answers."""
    each = [torch.tensor(p, dtype=torch.float64).mean() for p in prob]
    by_index = [{"prob": p, "avg_loss": x} for p, x in zip(prob, loss, strict=True)]
    return entry(mean(torch.stack(each)).value, by_index=by_index)


def _rouge(subject: Subject, name: str, rows: Sequence[Row]) -> Entries:
    return rouge_entry(subject, name, rows, subject.cfg.eval.max_new_tokens, "rougeL_recall")


def rouge_entry(
    subject: Subject, name: str, rows: Sequence[Row], tokens: int, kind: str,
    stop: Sequence[str] = (),
) -> Entries:  # fmt: skip
    """Greedy answers against the rows' own; texts are written if the subject shows them."""
    said = subject.written(rows, tokens, stop)
    wanted = generation.wanted(subject.tokenizer, rows)
    found = rouge_l(wanted, said)
    by_index: list[dict[str, Any]] = [
        {"rougeL_recall": r, "rougeL_f1": f}
        for r, f in zip(found.recall.tolist(), found.f1.tolist(), strict=True)
    ]
    if subject.show:
        asked = generation.prompts(subject.tokenizer, rows)
        for line, prompt, truth, text in zip(by_index, asked, wanted, said, strict=True):
            line |= {"input": prompt, "ground_truth": truth, "generation": text}
    value = found.recall if kind == "rougeL_recall" else found.f1
    return {name: entry(mean(value).value, by_index=by_index)}


def attack_entries(scores: Mapping[str, Mapping[str, Tensor]], auc: Mapping[str, float]) -> Entries:
    """Membership inference as OpenUnlearning writes it."""
    out: Entries = {}
    for name, sides in scores.items():
        parts = {
            side: entry(mean(v).value, by_index=[{"score": x} for x in v.tolist()])
            for side, v in sides.items()
        }
        out[name] = {**parts, "auc": auc[name], "agg_value": auc[name]}
    return out
