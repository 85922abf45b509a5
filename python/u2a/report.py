"""One self-contained page from metrics.json: predicted against realised gain first.

PNG pictures are embedded, text is escaped, a content-security policy forbids scripts and requests.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

CSS = """
:root{--ink:#1f2933;--muted:#6b7785;--line:#e3e8ee;--green:#2f7d4f;--amber:#b7791f;--red:#b83240}
body{font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif;color:var(--ink);margin:0;
background:#f6f8fa}
main{max-width:1080px;margin:0 auto;padding:32px 28px 60px;background:#fff;
box-shadow:0 0 0 1px var(--line)}
h1{font-size:26px;margin:0 0 4px}h2{font-size:19px;margin:38px 0 8px}
p{margin:6px 0 12px}.muted{color:var(--muted)}
table{border-collapse:collapse;width:100%;margin:10px 0 4px;font-variant-numeric:tabular-nums}
th,td{padding:6px 10px;border-bottom:1px solid var(--line);text-align:right}
th:first-child,td:first-child{text-align:left}th{color:var(--muted);font-weight:600;font-size:13px}
tr.u2a td{font-weight:650;background:#fdf3f4}
img{max-width:100%;height:auto;display:block;margin:8px 0}
.verdict{border-left:5px solid;padding:10px 16px;margin:18px 0;background:#f9fbfc}
.green{border-color:var(--green)}.amber{border-color:var(--amber)}.red{border-color:var(--red)}
code{background:#f1f4f7;padding:1px 5px;border-radius:3px;font-size:13px}
"""
ROUND = {
    "round": "round", "added": "added", "support": "support", "effective_support": "effective",
    "J": "J", "J_validation": "J, validation", "predicted": "predicted", "realised": "realised",
    "retain_ratio": "retain ratio", "mix": "mixed back to", "J_within": "J, validation, within",
    "positive": "gains > 0", "residual": "residual",
    "iterations": "iterations", "inner_gradient": "slope",
}  # fmt: skip
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def _text(value: Any) -> str:
    return html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))


def _table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[Any]]]) -> str:
    """`rows`: (css class, cells)."""
    top = "".join(f"<th>{_text(h)}</th>" for h in head)
    body = "".join(
        f'<tr class="{_text(css)}">' + "".join(f"<td>{_text(c)}</td>" for c in cells) + "</tr>"
        for css, cells in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _picture(png: bytes, alt: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    return f'<img alt="{_text(alt)}" src="data:image/png;base64,{data}">'


def _validation(metrics: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    v = metrics.get("validation")
    if not v:
        return "<p class=muted>Not measured in this run (validate.candidates is 0).</p>"
    rows = [
        ("", [f"{w:g}", *(f"{v['spearman'][s][i]:.3f}" for s in v["spearman"]), v["candidates"]])
        for i, w in enumerate(v["weights"])
    ]
    solve = metrics["solve"]
    note = f" ({_text(solve['note'])})" if solve.get("note") else ""
    return (
        _picture(pictures["predicted_realised"], "predicted against realised gain")
        + "<p>Realised: the inner problem is solved with the weight on that one example, starting "
        "from the optimum without it. Predicted: weight times the influence estimate, linearised "
        f"at that optimum. The run's own weight per example is {v['run_weight']:g}.</p>"
        + _table(["weight", *v["spearman"], "candidates"], rows)
        + f"<p class=muted>Solve: {_text(solve['method'])} on {_text(solve['curvature'])}, damping "
        f"{solve['damping']:.3g}{note}, {solve['iterations']} iterations, true residual "
        f"{solve['residual']:.1e}. Largest gradient entry left by the inner solves "
        f"{v['inner_gradient']:.1e}. Bands: bootstrap over the candidates.</p>"
    )


def _methods(metrics: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    head = ["method", "J (test)", "gain", "95 % interval", "margin acc.", "forget NLL"]
    head += ["retain ppl", "ratio", "support"]
    rows = []
    for m in metrics["methods"]:
        low, high = m["pa_gain_interval"]
        cells = [m["name"], f"{m['pa']:.4f}", f"{m['pa_gain']:+.4f}", f"{low:+.4f} .. {high:+.4f}"]
        accuracy = "-" if m["name"] == "base" else f"{m['margin_accuracy']:.3f}"
        cells += [accuracy, f"{m['forget_nll']:.3f}"]
        cells += [f"{m['retain_ppl']:.3f}", f"{m['retain_ratio']:.3f}", m["support"]]
        rows.append((m["name"] if m["name"] == "u2a" else "", cells))
    return (
        _table(head, rows)
        + "<p class=muted>Every method spends the same total weight in the same inner problem. "
        "J is the mean log-sigmoid of the scaled preference margin on held-out pairs. Intervals: "
        "paired bootstrap over the pairs.</p>"
        + _picture(pictures["trade_off"], "gain against retain perplexity")
    )


def _classes(metrics: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    shares = metrics.get("class_weight")
    if not shares:
        return ""
    classes = sorted({c for s in shares.values() for c in s})
    rows = [("", [c, *(f"{100 * s.get(c, 0.0):.1f} %" for s in shares.values())]) for c in classes]
    return (
        "<h2>Which planted classes were chosen</h2>"
        + _picture(pictures["class_weights"], "weight by planted class")
        + _table(["class", *shares], rows)
    )


def _rounds(metrics: Mapping[str, Any]) -> str:
    rows = [("", [r.get(k, "") for k in ROUND]) for r in metrics["rounds"]]
    return (
        "<h2>Rounds of the outer loop</h2>"
        + _table(list(ROUND.values()), rows)
        + "<p class=muted>Effective: (sum w)<sup>2</sup> / sum w<sup>2</sup>. Change of J since "
        "the round before, predicted by the gains and realised. Residual: relative, of the solve "
        "behind the gains. Slope: largest entry of the inner problem's gradient left by its solve. "
        "Beyond the bound on retain perplexity a round is judged mixed back to it: how far from "
        "the start, and J there."
        "</p>"
    )


def _data(stats: Mapping[str, Mapping[str, Any]]) -> str:
    keys = ["rows", "tokens", "answer_tokens", "duplicates", "truncated", "dropped"]
    head = ["set", "schema", *(k.replace("_", " ") for k in keys)]
    rows = [("", [name, s["schema"], *(s[k] for k in keys)]) for name, s in stats.items()]
    return "<h2>Data</h2>" + _table(head, rows)


def _facts(title: str, facts: Mapping[str, Any]) -> str:
    if not facts:
        return ""
    rows = [("", [k, v]) for k, v in facts.items()]
    return f"<h2>{_text(title)}</h2>" + _table(["", ""], rows)


def draw(metrics: Mapping[str, Any]) -> dict[str, bytes]:
    """The pictures that `metrics` has data for, by name, as PNG bytes. Needs matplotlib."""
    from u2a import plots

    pictures = {
        "trade_off": plots.trade_off(metrics["methods"]),
        "cost": plots.cost(metrics["cost"]),
    }
    if metrics.get("validation"):
        pictures["predicted_realised"] = plots.predicted_realised(metrics["validation"])
    if metrics.get("class_weight"):
        pictures["class_weights"] = plots.class_weights(metrics["class_weight"])
    return pictures


def render(metrics: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The page. `metrics` is the content of metrics.json, `pictures` what `draw` returned."""
    verdict = metrics["verdict"]
    reasons = "".join(f"<li>{_text(r)}</li>" for r in verdict["reasons"])
    parts = [
        f"<h1>{_text(metrics['title'])}</h1>",
        f'<p class="muted">{_text(metrics["subtitle"])}</p>',
        f'<div class="verdict {_text(verdict["level"])}"><b>{_text(verdict["headline"])}</b>'
        f"<ul>{reasons}</ul></div>",
        "<h2>Predicted against realised gain</h2>",
        _validation(metrics, pictures),
        "<h2>Preference alignment, forgetting, utility</h2>",
        _methods(metrics, pictures),
        _classes(metrics, pictures),
        "<h2>Cost</h2>",
        _picture(pictures["cost"], "seconds per stage"),
        _rounds(metrics),
        _data(metrics["data"]),
        _facts("Provenance", metrics["provenance"]),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_text(metrics['title'])}</title><style>{CSS}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )
