"""Float64 truth of whole models: reverse mode alone, in float64 all through."""

from __future__ import annotations

from functools import cache
from typing import Any

from _second_order import Problem, Setting, references


@cache
def whole(s: Setting) -> dict[str, Any]:
    return references(Problem.of(s))
