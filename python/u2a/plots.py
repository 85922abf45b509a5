"""The report's pictures, as PNG bytes. Every function takes plain data and draws one figure."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2933", "#6b7785", "#e3e8ee"
PALETTE = (
    "#0b6e99", "#d1495b", "#e08e0b", "#5b8c5a", "#7a5195", "#8d99ae", "#17becf", "#e377c2",
    "#8c564b", "#bcbd22", "#1f2933", "#f4a6a6", "#9ecae1", "#c5b0d5", "#c49c94", "#98df8a",
)  # fmt: skip
AGAIN = ", re-linearised"
MARKS = "osD^v"
STYLE: Any = {
    "font.size": 10,
    "axes.edgecolor": "#b8c2cc",
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "figure.dpi": 110,
}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def colours(names: Sequence[str]) -> dict[str, str]:
    return {n: PALETTE[i % len(PALETTE)] for i, n in enumerate(sorted(set(names)))}


def looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line of every name, no two alike for fifty of them; a re-linearised
    estimator is its plain one dashed, with hollow markers."""
    plain = list(dict.fromkeys(name.removesuffix(AGAIN) for name in names))
    out = {}
    for name in names:
        i, again = plain.index(name.removesuffix(AGAIN)), name.endswith(AGAIN)
        out[name] = {
            "color": plt.cm.tab10(i % 10), "marker": MARKS[i // 10 % len(MARKS)],
            "linestyle": "--" if again else "-",
        } | ({"markerfacecolor": "white"} if again else {})  # fmt: skip
    return out


def predicted_realised(validation: Mapping[str, Any]) -> bytes:
    """Left: gain predicted by the main solver against the realised one, at the smallest weight and
    at the run's. Right: Spearman correlation over the weight, one line per solver."""
    weights = validation["weights"]
    shown = list(dict.fromkeys([min(weights), validation["run_weight"]]))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(shown) + 1, figsize=(4.4 * (len(shown) + 1), 3.9))
        for axis, weight in zip(axes, shown, strict=False):
            _scatter(axis, validation, weight)
        _curves(axes[-1], validation)
        figure.tight_layout(w_pad=2.5)
        return _png(figure)


def _scatter(axis: Any, validation: Mapping[str, Any], weight: float) -> None:
    points = [p for p in validation["points"] if p["weight"] == weight]
    solver = validation["main"]
    palette = colours([p["planted"] for p in points])
    for name, colour in palette.items():
        of_class = [p for p in points if p["planted"] == name]
        x = [weight * p["predicted"][solver] for p in of_class]
        axis.scatter(
            x, [p["realised"] for p in of_class], s=26, color=colour, label=name, alpha=0.85
        )
    xs = [weight * p["predicted"][solver] for p in points]
    low, high = min(xs), max(xs)
    axis.plot([low, high], [low, high], color=MUTED, lw=1, ls="--", zorder=0)
    rho = validation["spearman"][solver][validation["weights"].index(weight)]
    axis.set_title(f"{solver}, weight {weight:g}: Spearman {rho:.3f}")
    axis.set_xlabel("predicted change of J")
    axis.set_ylabel("realised change of J")
    axis.ticklabel_format(style="sci", scilimits=(-2, 3), useMathText=True)
    axis.legend(fontsize=8, loc="best")


def _curves(axis: Any, validation: Mapping[str, Any]) -> None:
    weights = validation["weights"]
    order = sorted(range(len(weights)), key=lambda i: weights[i])
    x = [weights[i] for i in order]
    for (solver, rho), colour in zip(validation["spearman"].items(), cycle(PALETTE)):
        band = validation["interval"][solver]
        axis.plot(x, [rho[i] for i in order], marker="o", ms=4, color=colour, label=solver)
        axis.fill_between(
            x,
            [band[i][0] for i in order],
            [band[i][1] for i in order],
            color=colour,
            alpha=0.12,
            lw=0,
        )
    axis.axvline(validation["run_weight"], color=MUTED, lw=1, ls=":")
    axis.set_xscale("log")
    axis.set_xticks(x, [f"{w:g}" for w in x])
    axis.set_xticks([], minor=True)
    axis.set_ylim(top=1.02)
    axis.set_title("rank correlation over the weight")
    axis.set_xlabel("weight on the example (dotted: the run's)")
    axis.set_ylabel("Spearman, with bootstrap 95 % band")
    axis.legend(fontsize=8, loc="lower left")


def trade_off(methods: Sequence[Mapping[str, Any]]) -> bytes:
    """Test PA gain against the retain perplexity ratio, one point per method."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6.4, 4.2))
        for m in (m for m in methods if m["name"] != "start"):
            mine = m["name"] == "u2a"
            x, y, (low, high) = m["retain_ratio"], m["pa_gain"], m["pa_gain_interval"]
            colour = PALETTE[1] if mine else PALETTE[0]
            axis.errorbar(
                x, y, yerr=[[y - low], [high - y]], color=colour, lw=1, capsize=2, alpha=0.5
            )
            axis.scatter([x], [y], s=70 if mine else 40, color=colour, zorder=3)
            axis.annotate(
                m["name"], (x, y), xytext=(7, 5), textcoords="offset points", fontsize=9,
                fontweight="bold" if mine else "normal",
            )  # fmt: skip
        axis.axvline(1.05, color=MUTED, lw=1, ls=":")
        axis.set_xlabel("retain perplexity, ratio to base (dotted: +5 %)")
        axis.set_ylabel("gain of J on test pairs")
        axis.set_title("alignment gained against utility kept")
        axis.margins(x=0.15)
        return _png(figure)


def class_weights(shares: Mapping[str, Mapping[str, float]]) -> bytes:
    """Share of the weight on each planted class, a bar per method ("pool": row counts)."""
    classes = sorted({c for s in shares.values() for c in s})
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7.2, 0.75 * len(classes) + 1.6))
        height = 0.8 / len(shares)
        for k, ((name, share), colour) in enumerate(zip(shares.items(), cycle(PALETTE))):
            y = [i + (k - (len(shares) - 1) / 2) * height for i in range(len(classes))]
            axis.barh(
                y, [share.get(c, 0.0) for c in classes], height * 0.9, color=colour, label=name
            )
        axis.set_yticks(range(len(classes)), classes)
        axis.invert_yaxis()
        axis.set_xlabel("share")
        axis.set_title("where the weight went")
        axis.legend(fontsize=8, loc="lower right")
        return _png(figure)


def cost(stages: Sequence[Mapping[str, Any]]) -> bytes:
    """Seconds per stage."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7.2, 0.36 * len(stages) + 1.2))
        seconds = [s["seconds"] for s in stages]
        bars = axis.barh([s["stage"] for s in stages], seconds, 0.7, color=PALETTE[0])
        axis.bar_label(bars, [f"{s:.1f} s" for s in seconds], padding=3, fontsize=8, color=MUTED)
        axis.invert_yaxis()
        axis.set_xlabel("seconds")
        axis.set_title("cost by stage")
        axis.margins(x=0.12)
        return _png(figure)
