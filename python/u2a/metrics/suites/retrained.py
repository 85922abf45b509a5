"""What is known of a model trained without the forget set: the model, or OpenUnlearning's logs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from u2a.config import Config
from u2a.errors import DataError
from u2a.metrics.tofu import log_truth_ratio


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
