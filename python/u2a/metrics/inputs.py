"""What `u2a eval` needs before a model is loaded: suites with data for them, every row read."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from u2a.batch import Row
from u2a.config import Config, SourceConfig
from u2a.data import Prepared, load_rows
from u2a.errors import ConfigError, DataError
from u2a.metrics.suites.questions import Question, load_questions
from u2a.metrics.suites.tofu import MEANS, PARAPHRASED, PREFIX

if TYPE_CHECKING:
    from u2a.workspace import Workspace

SUITES = ("pa", "forget", "retain", "mia", "tofu", "muse")
NEEDS = {
    "mia": ("eval.holdout", "rows never trained on"),
    "tofu": ("eval.tofu", "a section with a source for forget"),
    "muse": ("eval.muse", "a section with forget_verbmem, forget_knowmem or retain_knowmem"),
}


def chosen_suites(cfg: Config, names: str | None) -> list[str]:
    """Those named (comma separated), else eval.suite, else all that have data. ConfigError else."""
    have = {"mia": cfg.eval.holdout, "tofu": cfg.eval.tofu, "muse": _muse(cfg) or None}
    asked = [n.strip() for n in names.split(",")] if names else cfg.eval.suite
    if asked is None:
        return [s for s in SUITES if s not in NEEDS or have[s] is not None]
    faults = [f"suite: {n!r}, wanted one of {', '.join(SUITES)}" for n in asked if n not in SUITES]
    for name in asked:
        if name in NEEDS and have[name] is None:
            key, what = NEEDS[name]
            faults.append(f"{key}: missing, wanted {what} for suite {name}")
    if not asked:
        faults.append(f"suite: empty, wanted some of {', '.join(SUITES)}")
    if faults:
        raise ConfigError(faults, "eval")
    return [s for s in SUITES if s in asked]


def _muse(cfg: Config) -> dict[str, SourceConfig]:
    found = cfg.eval.muse
    sets = {} if found is None else {
        "forget_verbmem": found.forget_verbmem,
        "forget_knowmem": found.forget_knowmem,
        "retain_knowmem": found.retain_knowmem,
    }  # fmt: skip
    return {name: spec for name, spec in sets.items() if spec is not None}


def _tofu(cfg: Config) -> dict[str, SourceConfig]:
    found = cfg.eval.tofu
    sets = {} if found is None else {
        "forget": found.forget,
        "retain": found.retain,
        "real_authors": found.real_authors,
        "world_facts": found.world_facts,
    }  # fmt: skip
    return {name: spec for name, spec in sets.items() if spec is not None}


@dataclass
class Inputs:
    """Rows of the chosen suites; `data` as prepared for the run."""

    suites: Sequence[str]
    data: Prepared
    holdout: list[Row] = field(default_factory=list)
    tofu: dict[str, list[Question]] = field(default_factory=dict)
    muse: dict[str, list[Row]] = field(default_factory=dict)

    def members(self) -> dict[str, list[Row]]:
        """Sets to be told from the holdout rows, by the suite that asks."""
        out: dict[str, list[Row]] = {}
        if self.holdout and ("mia" in self.suites or "muse" in self.suites):
            out["mia"] = self.data.forget
        if self.holdout and self.tofu:
            out["tofu"] = [q.right for q in self.tofu["forget"]]
        return out

    def absent(
        self, ratios: Container[str], min_k: Container[str], losses: Container[str]
    ) -> dict[str, str]:
        """What cannot be measured, and what it wants. Known of a retrained model: truth `ratios` by
        `MEANS`, and for which `members` its `min_k` AUC and `losses`."""
        out = {}
        if not self.holdout and {"tofu", "muse"} & set(self.suites):
            out["mia, privleak"] = "wants eval.holdout, rows never trained on"
        for key in self.members():
            lacks = [
                n for n, have in (("privleak", min_k), ("mia_reference", losses)) if key not in have
            ]
            if lacks:
                out[f"{key}: {', '.join(lacks)}"] = "wants --retain-model MODEL"
        for suffix in MEANS if "tofu" in self.suites else ():
            if suffix not in ratios:
                out[f"forget_quality{suffix}"] = "wants --retain-model, a model or logs with losses"
        lacks = [f"eval.tofu.{n}" for n in PREFIX if n not in self.tofu]
        if "tofu" in self.suites and lacks:
            out["model_utility"] = f"wants {', '.join(lacks)}"
        return out


def read_inputs(work: Workspace, suites: Sequence[str]) -> Inputs:
    """Raises DataError naming file and line, or holdout rows that are forget rows too."""
    cfg, tokenizer = work.cfg, work.tokenizer
    out = Inputs(suites, work.data)
    if "tofu" in suites:
        out.tofu = {
            name: load_questions(spec, tokenizer, cfg.data, paraphrased=name in PARAPHRASED)
            for name, spec in _tofu(cfg).items()
        }
    if "muse" in suites:
        out.muse = {
            name: load_rows(spec, tokenizer, cfg, role="retain")
            for name, spec in _muse(cfg).items()
        }
    if cfg.eval.holdout is not None and {"mia", "tofu", "muse"} & set(suites):
        out.holdout = load_rows(cfg.eval.holdout, tokenizer, cfg, role="retain")
        seen = {r.uid: r.source for rows in out.members().values() for r in rows}
        shared = [f"{r.source}: also {seen[r.uid]}" for r in out.holdout if r.uid in seen]
        if shared:
            path = cfg.eval.holdout.path
            raise DataError(f"{path}: {len(shared)} holdout rows are forget rows", shared[:10])
    return out
