"""The files of `u2a eval`: results.json as lm-eval writes it, samples.jsonl, OpenUnlearning's."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from u2a.metrics.estimate import Estimate
from u2a.metrics.suites.subject import Entries, Findings

KEPT = {
    "perplexity": False, "nll": False, "prob": True, "exact_memorisation": True,
    "extraction_strength": True, "rougeL_recall": True, "rougeL_f1": True, "over_refusal": False,
    "cleanness": True,
}  # fmt: skip
FORGOTTEN = {k: not v for k, v in KEPT.items()} | {
    "attack_success": False,
    "cleanness": True,
    "cleanness_indistinguishability": True,
}
HIGHER_IS_BETTER: dict[str, dict[str, bool]] = {
    "forget": FORGOTTEN,
    "retain": KEPT,
    "preference": dict.fromkeys(("objective", "margin", "margin_accuracy", "order_accuracy"), True),
    "answers": {
        "rougeL_recall": True, "rougeL_f1": True, "distinct_1": True, "distinct_2": True,
        "kl_to_reference": False, "reward": True, "win_rate": True, "win_rate_chosen": True,
    },
    "tofu": {
        "forget_quality": True, "model_utility": True, "forget_truth_ratio": True,
        "forget_quality_arithmetic": True, "model_utility_arithmetic": True,
        "forget_truth_ratio_arithmetic": True,
        "forget_Q_A_Prob": False, "forget_Q_A_ROUGE": False, "extraction_strength": False,
        "exact_memorization": False,
    },
    "muse": {
        "forget_verbmem_ROUGE": False, "forget_knowmem_ROUGE": False, "retain_knowmem_ROUGE": True,
    },
}  # fmt: skip


def plain(value: float) -> float | str:
    """JSON has no inf and nan."""
    return value if math.isfinite(value) else str(value)


def task_results(values: Mapping[str, Estimate], task: str) -> dict[str, Any]:
    """{"alias": task, "metric,none": value, "metric_stderr,none": its standard error or "N/A"}."""
    out: dict[str, Any] = {"alias": task}
    for name, found in values.items():
        out[f"{name},none"] = plain(found.value)
        out[f"{name}_stderr,none"] = "N/A" if math.isnan(found.stderr) else plain(found.stderr)
    return out


def of_entries(entries: Entries) -> dict[str, Estimate]:
    """The aggregates alone; `n` is the number of rows, where there are rows."""
    return {
        name: Estimate(float(e["agg_value"]), math.nan, len(e.get("value_by_index", ())))
        for name, e in entries.items()
    }


def results(
    tasks: Mapping[str, Mapping[str, Mapping[str, Estimate]]],
    absent: Mapping[str, str],
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """The whole of results.json. `tasks`: model -> task -> metric; "results" holds the unlearned
    model's, the others stand beside it under "models"."""
    rows = {
        task: max((v.n for v in values.values()), default=0)
        for task, values in tasks["unlearned"].items()
    }
    better = {
        task: {m: b for m, b in HIGHER_IS_BETTER.get(task, {}).items() if m in values}
        for task, values in tasks["unlearned"].items()
    }
    shown = {
        model: {task: task_results(v, task) for task, v in found.items()}
        for model, found in tasks.items()
    }
    return {
        "results": shown["unlearned"],
        "models": {name: v for name, v in shown.items() if name != "unlearned"},
        "higher_is_better": better,
        "n-samples": {t: {"original": n, "effective": n} for t, n in rows.items()},
        "absent": dict(absent),
        "config": dict(config),
    }


def sample_lines(model: str, findings: Iterable[Findings]) -> list[dict[str, Any]]:
    """One object per row and task."""
    return [
        {"model": model, "task": f.task, **{k: _plain(v) for k, v in sample.items()}}
        for f in findings
        for sample in f.samples
    ]


def _plain(value: Any) -> Any:
    return plain(value) if isinstance(value, float) else value


def _deep(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _deep(v) for k, v in value.items()}
    return [_deep(v) for v in value] if isinstance(value, list) else _plain(value)


def openunlearning(entries: Entries) -> tuple[str, str]:
    """(NAME_EVAL.json, NAME_SUMMARY.json): all entries by name, and their aggregates."""
    ordered = {name: _deep(entries[name]) for name in sorted(entries)}
    summary = {name: e["agg_value"] for name, e in ordered.items()}
    return tuple(json.dumps(x, indent=4, allow_nan=False) + "\n" for x in (ordered, summary))  # type: ignore[return-value]


def table(tasks: Mapping[str, Mapping[str, Mapping[str, Estimate]]]) -> str:
    """Base beside unlearned, for the terminal."""
    base, after = tasks.get("base", {}), tasks["unlearned"]
    lines: list[Sequence[str]] = [("task", "metric", "base", "unlearned")]
    for task, values in after.items():
        for name, found in values.items():
            before = base.get(task, {}).get(name)
            lines.append(
                (task, name, f"{before.value:.4g}" if before else "", f"{found.value:.4g}")
            )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )
