"""What each stage of a run does: reads what earlier stages left in the directory, adds its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from u2a import report
from u2a.adapter import adapter_disabled, snapshot
from u2a.bilevel import Finished, Growth, Plan, bilevel
from u2a.config import Config
from u2a.errors import GuardError
from u2a.metrics import comparison
from u2a.metrics.forgotten import Forgotten
from u2a.mixing import mix_back
from u2a.one_shot import one_shot
from u2a.rundir import RunDir
from u2a.select import Penalty
from u2a.validate import identity_gain, validate
from u2a.workspace import Workspace, model_digest

Files = list[str]
SCORES = "scores/part-00000.parquet"


class Run:
    """One run directory and the stages that fill it."""

    def __init__(self, cfg: Config, folder: RunDir, title: str) -> None:
        self.cfg, self.dir, self.title = cfg, folder, title
        self.work = Workspace(cfg, folder.path, lambda kind, facts: folder.event(kind, **facts))
        self.base = model_digest(cfg.model.name, cfg.model.revision)
        self.at: str | None = None

    def enter(self, adapter: str) -> None:
        """Puts the named saved adapter into the model unless it is there already."""
        if self.at != adapter:
            self.work.load_adapter(self.dir.file(adapter))
            self.at = adapter

    def save(self, adapter: str) -> str:
        with self.dir.atomic_dir(adapter) as temp:
            self.work.save_adapter(temp)
        self.at = adapter
        return adapter

    def prep(self) -> Files:
        data = self.work.data
        self.dir.write_jsonl("dropped.jsonl", [vars(d) for d in data.dropped])
        self.dir.write_json("prep.json", data.stats)
        self.dir.write_atomic("config.resolved.yaml", self.cfg.to_yaml())
        self.dir.write_manifest(seed=self.cfg.run.seed, data=data.stats, base=self.base)
        return ["dropped.jsonl", "prep.json", "config.resolved.yaml", "manifest.json"]

    def start(self) -> Files:
        """The optimum without any candidate: where the influence estimate is linearised."""
        facts = self.work.resolve(self.work.problem)
        self.dir.event("start", **facts)
        self.dir.write_json("start.json", facts)
        return [self.save("adapters/start"), "start.json"]

    def scan(self) -> Files:
        self.enter("adapters/start")
        outer = self.work.outer
        outer.progress = True
        scores, solution = outer.gains(torch.zeros(len(outer.problem.forget)))
        outer.progress = False
        plain = identity_gain(outer, scores.gain)
        bad = (~scores.finite).nonzero().flatten().tolist()
        if bad:
            uids = ", ".join(scores.uid[i] for i in bad[:3])
            raise GuardError(f"scan: {len(bad)} candidates have a non-finite gain: uid {uids}")
        columns = {"uid": scores.uid, "gain": scores.gain.tolist(), "identity": plain.tolist()}
        self.dir.write_parquet(SCORES, columns | {"finite": scores.finite.tolist()})
        settings = {"curvature": outer.settings.curvature, "precond": outer.settings.precond}
        self.dir.write_json("solve.json", settings | solution.facts())
        return [SCORES, "solve.json"]

    def gains(self) -> dict[str, Tensor]:
        table = self.dir.read_parquet(SCORES)
        solve = self.dir.read_json("solve.json")
        name = solve["curvature"] if solve["method"] in ("cg", "minres") else solve["method"]
        found = {name: torch.tensor(table["gain"])}
        if solve["method"] != "identity":
            found["identity"] = torch.tensor(table["identity"])
        return found

    def validate(self) -> Files:
        v, s = self.cfg.validation, self.cfg.select
        found = None
        if v.candidates:
            self.enter("adapters/start")
            outer = self.work.outer
            outer.progress = True
            count = min(s.budget, len(self.work.data.forget))
            found = validate(
                outer, self.gains(), count=v.candidates, weights=v.weights,
                run_weight=s.total_weight / count, seed=self.cfg.run.seed,
                tol=self.cfg.unlearn.tol, max_iter=self.cfg.unlearn.max_iter,
            )  # fmt: skip
            outer.progress = False
        self.dir.write_json("validation.json", found)
        return ["validation.json"]

    def _plan(self, n: int, growth: Growth) -> Plan:
        s = self.cfg.select
        budget = min(s.budget, n)
        return Plan(
            budget, s.total_weight, min(s.blocks, budget), growth, s.inverse, s.min_gain,
            s.updates, s.update, s.eta, cap=s.weight_cap * s.total_weight / budget,
            penalty=None if s.penalty == "none" else Penalty(s.penalty, s.penalty_weight),
            tolerance=s.tolerance, max_retain_ratio=s.max_retain_ratio, finished=self._early_exit(),
        )  # fmt: skip

    def _early_exit(self) -> Finished | None:
        below = self.cfg.select.early_exit
        return None if below is None else Forgotten(self.work.tokenizer, below)

    def select(self) -> Files:
        self.enter("adapters/start")
        s, n = self.cfg.select, len(self.work.data.forget)
        rounds: list[dict[str, Any]] = []
        if s.method in ("greedy", "pursuit", "quadratic", "official"):
            self.at = None
            found = bilevel(self.work.outer, self._plan(n, s.method))
            weights, rounds = found.weights, found.rounds
        else:
            weights = self.one_shot(s.method, s.total_weight)
        if not weights.any():
            raise GuardError(
                "select: nothing to unlearn: no candidate has a gain above min_gain, or no round "
                "raised J on the validation pairs (rounds in events.jsonl)"
            )
        gain = next(iter(self.gains().values())).tolist()
        order = sorted(weights.nonzero().flatten().tolist(), key=lambda i: -weights[i].item())
        rows = self.work.data.forget
        lines = [
            {"uid": rows[i].uid, "weight": weights[i].item(), "gain": gain[i], "rank": k, "row": i}
            for k, i in enumerate(order)
        ]
        self.dir.write_jsonl("selection.jsonl", lines)
        self.dir.write_json("rounds.json", rounds)
        return ["selection.jsonl", "rounds.json"]

    def one_shot(self, method: str, total: float) -> Tensor:
        """Weights of a selector without re-solve, at the start."""
        self.enter("adapters/start")
        return one_shot(self.work, next(iter(self.gains().values())), method, total)

    def plan(self) -> dict[str, Tensor]:
        """Weights of U2A and of every baseline, all with the same total."""
        weights = torch.zeros(len(self.work.data.forget))
        for line in self.dir.read_jsonl("selection.jsonl"):
            weights[line["row"]] = line["weight"]
        total, names = float(weights.sum()), self.cfg.eval.baselines
        return {"u2a": weights} | {name: self.one_shot(name, total) for name in names}

    def unlearn(self) -> Files:
        """Every method's weights, each model mixed back to the bound on retain perplexity."""
        facts, saved = {}, []
        bound, outer = self.cfg.select.max_retain_ratio, self.work.outer
        for name, weights in self.plan().items():
            self.enter("adapters/start")
            self.at, start = None, snapshot(self.work.model)
            found = self.work.unlearn(self.work.problem.with_weights(weights))
            mix = mix_back(self.work.model, start, outer.retain_perplexity, bound)
            facts[name] = found | {"mix": mix}
            saved.append(self.save("adapter" if name == "u2a" else f"adapters/{name}"))
            back = f", mixed back to {mix:.3f} of the way" if mix < 1 else ""
            print(f"  {name}: {found['steps']} steps {found['guard']}{back}", file=sys.stderr)
        self.dir.write_json("unlearn.json", facts)
        return [*saved, "unlearn.json"]

    def eval(self) -> Files:
        evaluator, plan = comparison.Evaluator(self.work), self.plan()
        with adapter_disabled(self.work.model):
            methods = [evaluator.method("base", None)]
        for name in ["start", *plan]:
            self.enter("adapter" if name == "u2a" else f"adapters/{name}")
            methods.append(evaluator.method(name, plan.get(name)))
        found = {
            "methods": methods,
            "class_weight": comparison.class_shares(self.work.data.forget, plan),
            "verdict": comparison.verdict(methods),
            "validation": self.dir.read_json("validation.json"),
            "solve": self.dir.read_json("solve.json"),
            "rounds": self.dir.read_json("rounds.json"),
            "unlearn": self.dir.read_json("unlearn.json"),
            "data": self.dir.read_json("prep.json"),
        }
        self.dir.write_json("metrics.json", found)
        return ["metrics.json"]

    def report(self) -> Files:
        cost = self.dir.read_json("times.json")
        facts = self.dir.read_json("metrics.json") | {
            "title": self.title,
            "subtitle": f"{self.cfg.unlearn.loss} on {Path(self.cfg.model.name).name}",
            "cost": [{"stage": k, "seconds": v} for k, v in cost.items()],
            "provenance": self.provenance(),
        }
        pictures = report.draw(facts)
        for name, png in pictures.items():
            self.dir.write_atomic(f"plots/{name}.png", png)
        self.dir.write_atomic("report.html", report.render(facts, pictures))
        return ["report.html", "plots"]

    def provenance(self) -> dict[str, Any]:
        from u2a.env import versions

        return {**versions(), "run directory": self.dir.path.name, "seed": self.cfg.run.seed}
