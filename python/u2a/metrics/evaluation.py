"""`u2a eval`: the unlearned model beside its base, written to eval/ in the run directory."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from u2a.adapter import adapter_disabled
from u2a.config import Config
from u2a.errors import DataError
from u2a.metrics import mia, results
from u2a.metrics.estimate import Estimate
from u2a.metrics.inputs import Inputs, chosen_suites, read_inputs
from u2a.metrics.suites import membership, preference, retrained, rows, tofu
from u2a.metrics.suites.muse import muse_suite
from u2a.metrics.suites.subject import Entries, Findings, Judges, Subject
from u2a.objectives import PairSet
from u2a.run import content_settings, stamp
from u2a.rundir import RunDir, file_hash
from u2a.workspace import Workspace, model_digest

Tasks = dict[str, dict[str, Estimate]]


def evaluate(
    cfg: Config,
    out: Path,
    *,
    adapter: Path | None = None,
    suites: str | None = None,
    retain_model: str | None = None,
    judges: Judges | None = None,
    show: bool = False,
) -> Path:
    """Measures the adapter (default: the run's own) and the base model; returns the eval folder.

    Args:
        suites: comma separated, see `u2a.metrics.inputs.SUITES`.
        retain_model: folder or hub id of a model trained without the forget set, or the
            TOFU_EVAL.json of one.
        show: texts in the samples.

    Raises ConfigError, DataError, GuardError (non-finite), MismatchError, CorruptError.
    """
    chosen = chosen_suites(cfg, suites)
    if not out.is_dir():
        raise DataError(f"{out}: no run directory; make one by `u2a run`, or name it by --out")
    with RunDir(out) as folder:
        work = Workspace(cfg, folder.path)
        found = _adapter(cfg, folder, adapter)
        inputs = read_inputs(work, chosen)
        asked = judges or Judges()
        with _asking(asked):
            reference = retrained.Retrained.of(work, inputs, retain_model, asked)
        absent = inputs.absent(reference.ratios, reference.min_k, reference.losses)
        work.load_adapter(found)
        job = _Job(work, inputs, reference, asked, show)
        tasks = dict(job.models())
        _write(folder, job, tasks, {
            "model": cfg.model.name,
            "revision": cfg.model.revision,
            "adapter": str(found),
            "adapter_blake2b": file_hash(found / "adapter_model.safetensors"),
            "retain_model": retain_model,
            "suites": chosen,
            "seed": cfg.run.seed,
            "functions": job.judges.names(),
            "generate": cfg.eval.generate,
            "max_new_tokens": cfg.eval.max_new_tokens,
        }, absent)  # fmt: skip
        return folder.file("eval")


def _adapter(cfg: Config, folder: RunDir, given: Path | None) -> Path:
    """The adapter named, or the run's own once its marker, settings and hashes agree."""
    if given is not None:
        if not (given / "adapter_model.safetensors").is_file():
            raise DataError(f"--adapter {given}: no adapter_model.safetensors in it")
        return given
    base = model_digest(cfg.model.name, cfg.model.revision)
    if not folder.is_done("unlearn", stamp(content_settings(cfg), base, "unlearn")):
        raise DataError(
            f"{folder.path}: no finished unlearning; end it by `u2a run`, or name an adapter by "
            "--adapter"
        )
    return folder.file("adapter")


@contextmanager
def _asking(judges: Judges) -> Iterator[None]:
    """What is wrong with the answer of a function of the user is a fault of the data."""
    try:
        yield
    except ValueError as e:
        if not judges.names():
            raise
        raise DataError(f"eval: {e}; asked were {judges.names()}") from e


@dataclass
class _Job:
    """The suites on base and unlearned model; entries and samples pile up."""

    work: Workspace
    inputs: Inputs
    retrained: retrained.Retrained
    judges: Judges
    show: bool
    samples: list[dict[str, Any]] = field(default_factory=list)
    entries: dict[str, Entries] = field(default_factory=dict)
    answers: preference.Answers | None = None

    def models(self) -> Iterator[tuple[str, Tasks]]:
        model, data = self.work.model, self.inputs.data
        held = None
        if "pa" in self.inputs.suites:
            held = PairSet.build(model, data.test, self.work.cfg.unlearn.batch_tokens)
        for name in ("base", "unlearned"):
            subject = Subject(
                name, model, self.work.tokenizer, self.work.cfg, self.show, self.judges
            )
            print(f"eval: {name} ...", file=sys.stderr, flush=True)
            with adapter_disabled(model) if name == "base" else nullcontext():
                yield name, self.tasks(subject, held)

    def tasks(self, subject: Subject, held: PairSet | None) -> Tasks:
        inputs, suites = self.inputs, self.inputs.suites
        found: list[Findings] = []
        with _asking(self.judges):
            found += self.asked(subject, held)
        entries: dict[str, Entries] = {}
        if "tofu" in suites:
            entries["tofu"] = tofu.tofu_suite(subject, inputs.tofu)
        if "muse" in suites:
            entries["muse"] = muse_suite(subject, inputs.muse)
        for key, members in inputs.members().items():
            facts, attacks = self.membership(subject, key, members)
            if key == "mia" and "mia" in suites:
                found.append(facts)
            for suite in ("tofu",) if key == "tofu" else ("muse",):
                if suite in entries:
                    entries[suite] |= attacks
        if "tofu" in entries:
            entries["tofu"] |= tofu.qualities(entries["tofu"], self.retrained.ratios)
        self.samples += results.sample_lines(subject.name, found)
        if subject.name == "unlearned":
            self.entries = entries
        return {f.task: f.values for f in found} | {
            suite: results.of_entries(e) for suite, e in entries.items()
        }

    def asked(self, subject: Subject, held: PairSet | None) -> list[Findings]:
        """The suites that ask the functions of the user."""
        inputs, found = self.inputs, list[Findings]()
        if held is not None:
            found.append(preference.preference_suite(subject, held))
            if subject.cfg.eval.generate:
                facts, ours = preference.answer_suite(subject, held.pairs, self.answers)
                self.answers = ours  # the base model comes first
                found.append(facts)
        for name, data in (("forget", inputs.data.forget), ("retain", inputs.data.retain_test)):
            if name in inputs.suites:
                sound = self.retrained.sound if name == "forget" else None
                found.append(rows.row_suite(subject, name, data, sound))
        return found

    def membership(self, subject: Subject, key: str, members: Any) -> tuple[Findings, Entries]:
        facts, scores = membership.membership_suite(
            subject, members, self.inputs.holdout, self.retrained.losses.get(key)
        )
        entries = tofu.attack_entries(scores, {n: facts.values[n].value for n in scores})
        if key in self.retrained.min_k:
            auc = facts.values["mia_min_k"].value
            leak = mia.privleak(auc, self.retrained.min_k[key])
            facts.single("privleak", leak)
            entries["privleak"] = tofu.entry(leak)
        return facts, entries


def _write(
    folder: RunDir,
    job: _Job,
    tasks: Mapping[str, Tasks],
    config: Mapping[str, Any],
    absent: Mapping[str, str],
) -> None:
    with folder.atomic_dir("eval") as temp:
        at = temp.name
        folder.write_json(f"{at}/results.json", results.results(tasks, absent, config))
        folder.write_jsonl(f"{at}/samples.jsonl", job.samples)
        for suite, entries in job.entries.items():
            whole, summary = results.openunlearning(entries)
            folder.write_atomic(f"{at}/{suite.upper()}_EVAL.json", whole)
            folder.write_atomic(f"{at}/{suite.upper()}_SUMMARY.json", summary)
    folder.event("eval", suites=config["suites"], adapter=config["adapter"])
    print(results.table(tasks))
    for name, why in absent.items():
        print(f"eval: no {name}: {why}", file=sys.stderr)
