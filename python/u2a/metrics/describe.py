"""docs/metrics.md from one table: `python -m u2a.metrics.describe > docs/metrics.md`."""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    """`function`: dotted path; `good`: which direction, and for whom; `suites`: of `u2a eval`."""

    name: str
    formula: str
    good: str
    function: str
    suites: str
    source: str


TOFU = "TOFU, arXiv 2401.06121"
MUSE = "MUSE, arXiv 2407.06460"
UNLEARNING = (
    Metric("perplexity", "exp(sum NLL / sum tokens), pooled", "retain low, forget high",
           "u2a.evaluate.perplexity", "forget, retain", ""),
    Metric("prob", "exp(-NLL/|y|)", "retain high, forget low",
           "u2a.metrics.answers.probability", "forget, retain, tofu", TOFU),
    Metric("prob with options", "p_right / (p_right + sum p_wrong)", "high",
           "u2a.metrics.answers.probability_with_options", "tofu", TOFU),
    Metric("ROUGE-L", "recall and f1 of the longest common subsequence of stemmed words",
           "retain high, forget low", "u2a.metrics.answers.rouge_l",
           "pa, forget, retain, tofu (recall), muse (f1)", "Lin 2004"),
    Metric("truth ratio", "TR = p_wrong / p_paraphrase; mean of p_wrong geometric (public code) or "
           "arithmetic (paper; names end in _arithmetic, as do utility and quality made of it)",
           "low: the truth is preferred", "u2a.metrics.tofu.truth_ratio", "tofu", TOFU),
    Metric("forget truth ratio", "mean min(TR, 1/TR)", "high",
           "u2a.metrics.tofu.closer_to_one", "tofu", TOFU),
    Metric("retain truth ratio", "mean max(0, 1 - TR)", "high",
           "u2a.metrics.tofu.truth_preferred", "tofu", TOFU),
    Metric("forget quality", "p-value of the KS test between TR of the unlearned and TR of a "
           "retrained model", "high", "u2a.metrics.tofu.forget_quality",
           "tofu, with --retain-model", TOFU),
    Metric("model utility", "harmonic mean of {prob, ROUGE, truth ratio} x {retain, real authors, "
           "world facts}", "high", "u2a.metrics.tofu.model_utility", "tofu", TOFU),
    Metric("exact memorisation", "mean_t 1[argmax = y_t]", "forget low",
           "u2a.metrics.memorisation.exact_memorisation", "forget, retain, tofu",
           "arXiv 2205.10770"),
    Metric("extraction strength", "1 - k/|y|, k = shortest prefix after which the rest is the "
           "argmax; 0 if not even the last token is (OpenUnlearning: 1/|y|)", "forget low",
           "u2a.metrics.memorisation.extraction_strength", "forget, retain, tofu",
           "arXiv 2012.07805, 2406.09179"),
    Metric("VerbMem, KnowMem", "ROUGE-L f1 of a continuation (128 tokens), of an answer (32)",
           "forget low, retain high", "u2a.metrics.suites.muse.muse_suite", "muse", MUSE),
)  # fmt: skip
MEMBERSHIP = (
    Metric("mia_loss", "NLL/|y|", "AUC 0.5", "u2a.metrics.mia.loss_score", "mia, tofu, muse",
           "arXiv 1709.01604"),
    Metric("mia_zlib", "(NLL/|y|) / bytes of zlib(answer)", "AUC 0.5",
           "u2a.metrics.mia.zlib_score", "mia, tofu, muse", "arXiv 2012.07805"),
    Metric("mia_reference", "NLL/|y| - that of a retrained model", "AUC 0.5",
           "u2a.metrics.mia.reference_score", "mia, tofu, muse, with --retain-model",
           "arXiv 2012.07805"),
    Metric("mia_gradnorm", "norm of grad NLL/|y| over the weights of linear layers below the head",
           "AUC 0.5", "u2a.metrics.mia.gradient_norms", "mia, tofu, muse", "arXiv 2402.17012"),
    Metric("mia_min_k", "-mean of the lowest 40 % of log p_t", "AUC 0.5", "u2a.metrics.mia.min_k",
           "mia, tofu, muse", "Min-K% Prob, arXiv 2310.16789"),
    Metric("mia_min_k_plus_plus", "the same of (log p_t - mu_t) / sigma_t, moments of log p over "
           "the vocabulary", "AUC 0.5", "u2a.metrics.mia.min_k_plus_plus", "mia, tofu, muse",
           "Min-K%++, arXiv 2404.02936"),
    Metric("AUC", "P(score of a held-out row > score of a forget row), ties half",
           "0.5; 1: forget rows look memorised", "u2a.metrics.mia.auc", "mia, tofu, muse", ""),
    Metric("privleak", "100 ((1 - AUC_u) - (1 - AUC_r)) / (1 - AUC_r), AUCs of mia_min_k",
           "0; below: under-, above: over-unlearned", "u2a.metrics.mia.privleak",
           "mia, tofu, muse, with --retain-model", MUSE),
)  # fmt: skip
ALIGNMENT = (
    Metric("objective", "mean log sigmoid(beta margin)", "high", "u2a.evaluate.preference", "pa",
           "DPO, arXiv 2305.18290"),
    Metric("margin accuracy", "mean 1[margin > 0], margin = log-ratio of chosen - of rejected",
           "high", "u2a.evaluate.preference", "pa", ""),
    Metric("reward", "mean r(x, y) of the model's sampled answers, r with TRL's signature", "high",
           "u2a.metrics.alignment.mean_reward", "pa, with --reward", ""),
    Metric("win rate", "(wins + ties/2) / n, 95 % Wilson interval, of sampled answers over the "
           "base model's and over the chosen ones; a judge asked in both orders, or the reward",
           "high", "u2a.metrics.alignment.judged_win_rate", "pa, with --compare or --reward", ""),
    Metric("attack success", "share of harmful prompts answered: no refusal phrase, or a judge",
           "low", "u2a.metrics.alignment.attack_success", "forget (--judge)", "arXiv 2307.15043"),
    Metric("over-refusal", "share of benign prompts refused", "low",
           "u2a.metrics.alignment.over_refusal", "retain", ""),
    Metric("distinct-n", "different n-grams / all, pooled or mean per text", "high",
           "u2a.metrics.alignment.distinct_n", "pa", "arXiv 1510.03055"),
    Metric("KL to the reference", "mean lp - lp_ref over the model's own samples", "low",
           "u2a.metrics.alignment.kl_to_reference", "pa", ""),
    Metric("cleanness", "mean P(sound text) by a classifier of gibberish", "high",
           "u2a.metrics.alignment.cleanness", "forget, retain, with --classifier",
           "AltPO, arXiv 2409.13474"),
    Metric("cleanness indistinguishability", "p-value of the KS test between P(sound) of the "
           "unlearned and of a retrained model's answers", "high",
           "u2a.metrics.estimate.same_distribution",
           "forget, with --classifier and --retain-model", "AltPO, arXiv 2409.13474"),
)  # fmt: skip
GROUPS = {
    "Unlearning": UNLEARNING,
    "Membership inference": MEMBERSHIP,
    "Preference alignment": ALIGNMENT,
}


def _cells(*cells: str) -> str:
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"


def markdown() -> str:
    """The page as one string."""
    lines = [
        "# Metrics",
        "",
        "Written by `python -m u2a.metrics.describe`. NLL = -log pi(y|x) summed over the |y|",
        "answer tokens, p_t one token's probability. `suites`: of `u2a eval` where it is measured;",
        "`library`: a function to call. Memorisation and Min-K leave out the end-of-sequence token",
        "that closes an answer, as OpenUnlearning does; NLL and prob count it.",
    ]
    for title, metrics in GROUPS.items():
        lines += ["", f"## {title}", ""]
        lines += [_cells("name", "formula", "good", "function", "suites", "source")]
        lines += [_cells(*["---"] * 6)]
        lines += [
            _cells(m.name, f"`{m.formula}`", m.good, f"`{m.function}`", m.suites, m.source)
            for m in metrics
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
