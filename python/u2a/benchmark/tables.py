"""Markdown tables and pictures of what the validation benchmark measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from u2a.benchmark.task import SCALE, UTILITY
from u2a.plots import STYLE, _png, looks, plt

Rows = Sequence[Mapping[str, Any]]


def report(out: Path, rows: Mapping[str, Rows]) -> None:
    """validation.md, predicted.png and alignment.png under `out`."""
    parts = ["# Validation\n", predicted_table(rows["predicted"]), alignment_table(rows)]
    parts += [tuned_table(rows), noise_table(rows["alignment"]), class_table(rows["alignment"])]
    parts.append(detection_table(rows["detection"]))
    (out / "validation.md").write_text("\n".join(p for p in parts if p), encoding="utf-8")
    (out / "predicted.png").write_bytes(predicted_picture(rows["predicted"]))
    (out / "alignment.png").write_bytes(alignment_picture(rows["alignment"]))


def mean(rows: Rows, by: Sequence[str], of: str) -> dict[tuple[Any, ...], list[float]]:
    """{group: values over seeds}."""
    found: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row in rows:
        found[tuple(row[b] for b in by)].append(row[of])
    return dict(found)


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)]) + "\n"


def predicted_table(rows: Rows) -> str:
    """Spearman(predicted, realised), mean over seeds, a row per loss, design and weight."""
    if not rows:
        return ""
    found = mean(rows, ("loss", "design", "weight", "estimator"), "rho")
    names = list(dict.fromkeys(r["estimator"] for r in rows))
    body = [
        (
            *map(str, at),
            *(f"{fmean(found[*at, n]):.3f}" if (*at, n) in found else "" for n in names),
        )
        for at in dict.fromkeys((r["loss"], r["design"], r["weight"]) for r in rows)
    ]
    seeds = len({r["seed"] for r in rows})
    title = f"## Predicted against realised gain: Spearman, mean of {seeds} seeds\n\n"
    return title + table(["loss", "unlearnt", "weight", *names], body)


def alignment_table(rows: Mapping[str, Rows]) -> str:
    """Test J gained at equal utility: mean over seeds per loss, area over the total weights."""
    found = rows["alignment"]
    if not found:
        return ""
    noise = max(r["noise"] for r in found)
    shown = [r for r in found if r["noise"] == noise]
    gains = mean(shown, ("loss", "selector", "total"), "gain")
    epochs = mean(shown, ("selector",), "epochs")
    losses = list(dict.fromkeys(r["loss"] for r in shown))
    totals = sorted({r["total"] / SCALE[r["loss"]] for r in shown})
    body = []
    for name in dict.fromkeys(r["selector"] for r in shown):
        cells = []
        for loss in losses:
            over = [fmean(gains[loss, name, s * SCALE[loss]]) for s in totals]
            cells.append(f"**{fmean(over):+.3f}** ({_each(over)})")
        body.append((name, *cells, f"{fmean(epochs[name,]):.0f}"))
    body += reference_lines([r for r in rows["upper"] if r["noise"] == noise], losses)
    title = (
        f"## Test J gained at equal utility ({noise:.0%} mislabelled)\n\nBold: mean over total "
        f"weights of {', '.join(map(str, totals))} in NPO's unit; in brackets each; last "
        "column: cost of selecting, in epochs over the candidates. Last lines: what needs no "
        "candidates, with its retain perplexity where that is above the bound.\n\n"
    )
    return title + table(["selector", *losses, "epochs"], body)


def tuned(rows: Rows) -> dict[tuple[str, str], list[float]]:
    """{(loss, selector): test gain of every seed at the total weight of best validation gain}."""
    best: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for row in rows:
        key = row["loss"], row["selector"], row["seed"]
        if key not in best or row["validation"] > best[key]["validation"]:
            best[key] = row
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for (loss, name, _), row in best.items():
        found[loss, name].append(row["gain"])
    return dict(found)


def tuned_table(rows: Mapping[str, Rows]) -> str:
    """Test J gained where every selector's total weight is chosen on the validation pairs."""
    if not rows["alignment"]:
        return ""
    noise = max(r["noise"] for r in rows["alignment"])
    found = tuned([r for r in rows["alignment"] if r["noise"] == noise])
    losses = list(dict.fromkeys(loss for loss, _ in found))
    body = [
        (name, *(f"{fmean(found[lo, name]):+.3f} ({_each(found[lo, name])})" for lo in losses))
        for name in dict.fromkeys(name for _, name in found)
    ]
    title = (
        f"## The same at the total weight that the validation pairs choose ({noise:.0%} "
        "mislabelled)\n\nMean over seeds; in brackets each.\n\n"
    )
    return title + table(["selector", *losses], body)


def _each(values: Sequence[float]) -> str:
    return " ".join(f"{x:+.2f}" for x in values)


def reference_lines(rows: Rows, losses: Sequence[str]) -> list[tuple[str, ...]]:
    """A line per reference: mean gain over seeds under each loss."""
    gains, ratios = (mean(rows, ("loss", "selector"), of) for of in ("gain", "ratio"))

    def cell(loss: str, name: str) -> str:
        at = (loss, name)
        if at not in gains:
            return ""
        ratio = fmean(ratios[at])
        return f"{fmean(gains[at]):+.3f}" + (f" (x {ratio:.2f})" if ratio > UTILITY else "")

    words = {"DPO": "DPO on the pairs", "SFT": "SFT on the chosen answers"}
    return [
        (words.get(name, name), *(cell(loss, name) for loss in losses), "")
        for name in dict.fromkeys(r["selector"] for r in rows)
    ]


def noise_table(rows: Rows) -> str:
    """Mean gain over total weights, per share of mislabelled candidates, and what noise costs."""
    levels = sorted({r["noise"] for r in rows})
    loss = next((r["loss"] for r in rows if r["noise"] == levels[0]), "")
    gains = mean([r for r in rows if r["loss"] == loss], ("selector", "noise"), "gain")
    names = [n for n in dict.fromkeys(r["selector"] for r in rows) if (n, levels[0]) in gains]
    if len(levels) < 2:
        return ""
    body = []
    for name in names:
        values = [fmean(gains[name, level]) for level in levels]
        body.append((name, *(f"{v:+.3f}" for v in values), f"{values[0] - values[-1]:+.3f}"))
    head = ["selector", *(f"{level:.0%}" for level in levels), "lost"]
    return f"## Mislabelled candidates, {loss}\n\n" + table(head, body)


def class_table(rows: Rows) -> str:
    """Share of weight by planted class, mean over what was measured at the highest noise."""
    if not rows:
        return ""
    noise = max(r["noise"] for r in rows)
    rows = [r for r in rows if r["noise"] == noise]
    kinds = sorted({k for r in rows for k in r["shares"]})
    body = []
    for name in dict.fromkeys(r["selector"] for r in rows):
        mine = [r["shares"] for r in rows if r["selector"] == name]
        body.append((name, *(f"{fmean(s.get(k, 0.0) for s in mine):.2f}" for k in kinds)))
    return f"## Share of the weight by planted class ({noise:.0%} mislabelled)\n\n" + table(
        ["selector", *kinds], body
    )


def detection_table(rows: Rows) -> str:
    if not rows:
        return ""
    found = mean(rows, ("estimator", "noise"), "auroc")
    levels = sorted({r["noise"] for r in rows})
    body = [
        (name, *(f"{fmean(found[name, x]):.3f}" for x in levels))
        for name in dict.fromkeys(r["estimator"] for r in rows)
    ]
    head = ["estimator", *(f"{x:.0%}" for x in levels)]
    return "## Mislabelled candidates found by a low gain: AUROC\n\n" + table(head, body)


def predicted_picture(rows: Rows) -> bytes:
    """Spearman over the weight: a row of panels per loss, a panel per design, a line per estimator,
    bars one standard deviation over seeds."""
    designs = list(dict.fromkeys(r["design"] for r in rows)) or ["single"]
    losses = list(dict.fromkeys(r["loss"] for r in rows)) or ["npo"]
    style = looks(list(dict.fromkeys(r["estimator"] for r in rows)))
    found = mean(rows, ("loss", "design", "estimator", "weight"), "rho")
    size = (4.2 * len(designs), 3.0 * len(losses))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(losses), len(designs), figsize=size, sharey=True, squeeze=False
        )
        for line, loss in zip(axes, losses, strict=True):
            for axis, design in zip(line, designs, strict=True):
                for name, look in style.items():
                    at = [w for lo, d, n, w in found if (lo, d, n) == (loss, design, name)]
                    over = [found[loss, design, name, w] for w in at]
                    axis.errorbar(
                        at, list(map(fmean, over)), list(map(pstdev, over)), **look,
                        label=name, markersize=4, capsize=2, linewidth=1.2,
                    )  # fmt: skip
                axis.set(title=f"{loss}, {design}", xscale="log", ylim=(-0.25, 1.05))
                axis.set_xticks(
                    at := sorted({w for lo, *_, w in found if lo == loss}), map(str, at)
                )
                axis.set_xticks([], minor=True)
            line[0].set_ylabel("Spearman")
        for axis in axes[-1]:
            axis.set_xlabel("weight of each candidate")
        axes[0][-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        figure.tight_layout()
        return _png(figure)


def alignment_picture(rows: Rows) -> bytes:
    """Test J gained over the total weight, a panel per loss."""
    losses = list(dict.fromkeys(r["loss"] for r in rows)) or ["npo"]
    noise = max((r["noise"] for r in rows), default=0.0)
    shown = [r for r in rows if r["noise"] == noise]
    found = mean(shown, ("loss", "selector", "total"), "gain")
    style = looks(list(dict.fromkeys(r["selector"] for r in shown)))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(losses), figsize=(4.2 * len(losses), 4), sharey=True, squeeze=False
        )
        for axis, loss in zip(axes[0], losses, strict=True):
            for name, look in style.items():
                at = sorted({s for lo, n, s in found if (lo, n) == (loss, name)})
                ours = name.startswith("u2a")
                axis.plot(
                    at, [fmean(found[loss, name, s]) for s in at],
                    **look | {"linestyle": "-" if ours else "--"}, markersize=6 if ours else 4,
                    linewidth=2 if ours else 1, label=name,
                )  # fmt: skip
            axis.set(title=loss, xscale="log", xlabel="total weight")
        axes[0][0].set_ylabel("test J gained at equal utility")
        axes[0][-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
        figure.tight_layout()
        return _png(figure)
