"""What is known of a model trained without the forget set: the model, or OpenUnlearning's logs."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from u2a.config import Config
from u2a.errors import DataError
from u2a.metrics.alignment import clean
from u2a.metrics.suites import membership, tofu
from u2a.metrics.suites.subject import Judges, Subject
from u2a.metrics.tofu import log_truth_ratio

if TYPE_CHECKING:
    from u2a.metrics.inputs import Inputs
    from u2a.workspace import Workspace


class Logs:
    """`TOFU_EVAL.json` of a retrained model. Raises DataError naming file and field."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.found = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as e:
            raise DataError(f"{path}: not readable as JSON: {e}") from None
        if not isinstance(self.found, dict):
            raise DataError(f"{path}: {type(self.found).__name__}, wanted an object of metrics")

    def _get(self, *keys: str) -> Any:
        at: Any = self.found
        for i, key in enumerate(keys):
            if not isinstance(at, dict) or key not in at:
                raise DataError(f"{self.path}: {'.'.join(keys[: i + 1])}: missing")
            at = at[key]
        return at

    def truth_ratios(self) -> dict[str, Tensor]:
        """log TR `[R]` by `MEANS`: the geometric one as it stands there, the arithmetic one from
        the losses of the answers, if they are there too."""
        found = [row[0] for row in self._rows("forget_truth_ratio", "score")]
        out = {"": torch.stack(found).clamp_min(1e-300).log()}
        names = [f"forget_Q_A_{kind}_Prob" for kind in ("PARA", "PERT")]
        if set(names) <= set(self.found):
            right, wrong = (self._rows(name, "avg_loss") for name in names)
            if len(right) != len(wrong):
                raise DataError(
                    f"{self.path}: {len(right)} rows {names[0]}, {len(wrong)} {names[1]}"
                )
            out["_arithmetic"] = log_truth_ratio(
                -torch.stack([r[0] for r in right]), [-w for w in wrong], "arithmetic"
            )
        return out

    def _rows(self, name: str, key: str) -> list[Tensor]:
        """The numbers `key` of every row, one or several `[>= 1]`."""
        rows = self._get(name, "value_by_index")
        where = f"{self.path}: {name}.value_by_index"
        if not isinstance(rows, dict) or not rows:
            raise DataError(f"{where}: wanted an object of rows")
        out = []
        for i, row in rows.items():
            value = row.get(key) if isinstance(row, dict) else None
            several = value if isinstance(value, list) and value else [value]
            numbers = [_number(f"{where}.{i}.{key}", x) for x in several]
            out.append(torch.tensor(numbers, dtype=torch.float64))
        return out

    def min_k_auc(self) -> float:
        return _number(f"{self.path}: mia_min_k.agg_value", self._get("mia_min_k", "agg_value"))


def _number(where: str, value: Any) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not (good and math.isfinite(value) and value >= 0):
        raise DataError(f"{where}: {value!r:.40}, wanted a finite number >= 0")
    return float(value)


def load_model(path: str, cfg: Config) -> nn.Module:
    """A whole model (no adapter) in the run's dtype, in eval mode on the run's device."""
    from transformers import AutoModelForCausalLM

    folder = Path(path)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise DataError(f"--retain-model {path}: no .safetensors weights (pickle is not read)")
    if (folder / "adapter_config.json").exists():
        raise DataError(f"--retain-model {path}: an adapter, wanted a whole model; merge it first")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, cfg.model.dtype), use_safetensors=True,
            trust_remote_code=False, attn_implementation="sdpa",
        )  # fmt: skip
    except (OSError, ValueError) as e:
        raise DataError(f"--retain-model {path}: cannot be loaded: {e}") from None
    model.config.use_cache = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return nn.Module.to(model, device).eval()


@dataclass
class Retrained:
    """Numbers of the model trained without the forget set: log truth ratios by `MEANS`, AUC of
    Min-K and mean losses by the suite that wants them, P(sound) of its answers to forget rows."""

    ratios: dict[str, Tensor] = field(default_factory=dict)
    min_k: dict[str, float] = field(default_factory=dict)
    losses: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    sound: Tensor | None = None

    @classmethod
    def of(cls, work: Workspace, inputs: Inputs, name: str | None, judges: Judges) -> Retrained:
        """Of a folder or hub id, of logs, or of nothing."""
        if name is None:
            return cls()
        if not name.endswith(".json"):
            model = load_model(name, work.cfg)
            return cls()._measure(
                Subject("retrained", model, work.tokenizer, work.cfg), inputs, judges
            )
        logs, out = Logs(Path(name)), cls()
        if inputs.tofu:
            out.ratios = logs.truth_ratios()
        if "tofu" in inputs.members():
            out.min_k["tofu"] = logs.min_k_auc()
        return out

    def _measure(self, subject: Subject, inputs: Inputs, judges: Judges) -> Retrained:
        if inputs.tofu:
            self.ratios = tofu.truth_ratios(subject, inputs.tofu["forget"])
        for key, members in inputs.members().items():
            self.min_k[key] = membership.min_k_auc(subject, members, inputs.holdout)
            self.losses[key] = (
                membership.mean_losses(subject, members),
                membership.mean_losses(subject, inputs.holdout),
            )
        rows = inputs.data.forget[: subject.cfg.eval.generate]
        if "forget" in inputs.suites and rows and judges.classifier is not None:
            self.sound = clean(subject.written(rows), judges.classifier)
        return self
