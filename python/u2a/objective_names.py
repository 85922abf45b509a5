"""What the objective and the selector of a configuration need beside their names, without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from u2a.config import Config

DRAWN = ("reward", "divergence")
BY_ROW = ("pursuit", "quadratic", "grad-norm", "cosine", "trak")


def function_name(value: Any) -> str | None:
    """None or "module:function". Raises ValueError."""
    if value is None:
        return None
    module, _, function = value.partition(":") if isinstance(value, str) else ("", "", "")
    if not (function.isidentifier() and all(p.isidentifier() for p in module.split("."))):
        raise ValueError("'module:function' with the signature of TRL's reward functions")
    return str(value)


def reward_source(value: Any) -> str | None:
    """None, "module:function" or the name of a column of the forget file. Raises ValueError."""
    if value is None or (isinstance(value, str) and value and ":" not in value):
        return value
    return function_name(value)


def objective_faults(cfg: Config) -> list[str]:
    """What the configured objective and selector lack or cannot be combined with."""
    o, s, out = cfg.objective, cfg.select, []
    if o.name in DRAWN and o.reward is None:
        out.append(
            f"objective.reward: None, wanted 'module:function' beside objective.name {o.name}"
        )
    if o.name in DRAWN and s.method == "quadratic":
        out.append(
            f"select.method: 'quadratic', wanted another beside objective.name {o.name}: an "
            "expectation over drawn answers has no Hessian product"
        )
    low = s.method == "low-reward" or "low-reward" in cfg.eval.baselines
    if low and s.reward is None and o.reward is None:
        out.append(
            "select.reward: None, wanted 'module:function' or a column of data.forget for the "
            "selector low-reward"
        )
    return out
