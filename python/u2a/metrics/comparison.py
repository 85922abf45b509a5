"""metrics.json: every method's preference alignment, forgetting and utility, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from u2a.adapter import adapter_disabled
from u2a.batch import Row
from u2a.evaluate import forget_nll, perplexity, preference
from u2a.objectives import PairSet
from u2a.workspace import Workspace

UTILITY = 1.05


def bootstrap_mean(x: Tensor, draws: int, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the mean of x `[n]`."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, len(x), (draws, len(x)), generator=generator)
    means = x.double()[index].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


class Evaluator:
    """Test J per pair, forget NLL, held-out retain perplexity, against the adapter-free model."""

    def __init__(self, work: Workspace) -> None:
        self.work = work
        self.tokens = work.cfg.unlearn.batch_tokens
        self.test = PairSet.build(work.model, work.data.test, self.tokens)
        with adapter_disabled(work.model):
            self.base_terms = self._terms()
            self.base_ppl = perplexity(work.model, work.data.retain_test, self.tokens)

    def _terms(self) -> Tensor:
        return self._preference().terms

    def _preference(self) -> Any:
        return preference(
            self.work.model,
            self.test.pairs,
            (self.test.chosen, self.test.rejected),
            beta=self.work.cfg.objective.beta,
            batch_tokens=self.tokens,
        )

    def method(self, name: str, weights: Tensor | None) -> dict[str, Any]:
        """One row of the table for the model as it is now."""
        work, found = self.work, self._preference()
        gain = (found.terms - self.base_terms).double()
        seed, draws = work.cfg.run.seed, work.cfg.eval.bootstrap
        ppl = perplexity(work.model, work.data.retain_test, self.tokens)
        return {
            "name": name,
            "pa": found.objective,
            "pa_gain": float(gain.mean()),
            "pa_gain_interval": bootstrap_mean(gain, draws, seed),
            "margin_accuracy": found.accuracy,
            "forget_nll": forget_nll(work.model, work.data.forget, self.tokens),
            "retain_ppl": ppl,
            "retain_ratio": ppl / self.base_ppl,
            "support": 0 if weights is None else int((weights > 0).sum()),
            "total_weight": 0.0 if weights is None else float(weights.sum()),
        }


def class_shares(rows: Sequence[Row], methods: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Share of rows ("pool") and of each method's weight by planted class, if there are any."""
    classes = [r.meta.get("planted") for r in rows]
    if any(c is None for c in classes):
        return {}
    shares = {"pool": torch.ones(len(rows)), **methods}
    return {
        name: {
            str(c): float(w[[k == c for k in classes]].sum() / w.sum().clamp_min(1e-30))
            for c in sorted(set(map(str, classes)))
        }
        for name, w in shares.items()
    }


def verdict(methods: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Green: J rose beyond its interval, utility within +5 %, no baseline of such utility ahead.

    Red: J fell or utility is lost. Amber: everything between.
    """
    u2a = next(m for m in methods if m["name"] == "u2a")
    low, _ = u2a["pa_gain_interval"]
    rivals = [m for m in methods if m["name"] not in ("u2a", "base", "start")]
    better = [m for m in rivals if m["pa_gain"] > u2a["pa_gain"] and m["retain_ratio"] <= UTILITY]
    kept = u2a["retain_ratio"] <= UTILITY
    reasons = [
        f"J on test pairs {u2a['pa_gain']:+.4f} (95 % interval from {low:+.4f})",
        f"retain perplexity x {u2a['retain_ratio']:.3f} (wanted at most {UTILITY})",
    ]
    for m in rivals:
        note = "" if m["retain_ratio"] <= UTILITY else f", at retain x {m['retain_ratio']:.3f}"
        reasons.append(f"{m['name']}: {m['pa_gain']:+.4f} at the same total weight{note}")
    level = "green" if low > 0 and kept and not better else "amber"
    if u2a["pa_gain"] <= 0 or u2a["retain_ratio"] > 1.3:
        level = "red"
    words = {"green": "aligned, utility kept", "amber": "look closer", "red": "do not use"}
    return {"level": level, "headline": words[level], "reasons": reasons}
