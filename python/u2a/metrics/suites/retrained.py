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

    def truth_ratios(self) -> Tensor:
        """log TR `[R]`."""
        rows = self._get("forget_truth_ratio", "value_by_index")
        where = f"{self.path}: forget_truth_ratio.value_by_index"
        if not isinstance(rows, dict) or not rows:
            raise DataError(f"{where}: wanted an object of rows")
        values = [_number(f"{where}.{i}.score", self._get_score(row)) for i, row in rows.items()]
        return torch.tensor(values, dtype=torch.float64).clamp_min(1e-300).log()

    def _get_score(self, row: Any) -> Any:
        return row.get("score") if isinstance(row, dict) else None

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
