"""U2A: bi-level, influence-guided unlearning of language models.

Public names load on first use, so that `import u2a` and `u2a --help` need neither torch nor
transformers. Several share the name of their module; the public name wins.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from u2a.bilevel import bilevel
    from u2a.curvature import GaussNewton, Hessian, Sum, symmetry
    from u2a.dual import dual
    from u2a.linearize import linearize
    from u2a.per_example import per_example_curvature
    from u2a.products import answer_logps, ggnvp, gradient, hvp, jvp_scores
    from u2a.scan import scan
    from u2a.select import select
    from u2a.solve import solve
    from u2a.trainer import U2ATrainer

__version__ = "0.1.0"
_HOME = {
    "GaussNewton": "curvature",
    "Hessian": "curvature",
    "Sum": "curvature",
    "U2ATrainer": "trainer",
    "answer_logps": "products",
    "bilevel": "bilevel",
    "dual": "dual",
    "ggnvp": "products",
    "gradient": "products",
    "hvp": "products",
    "jvp_scores": "products",
    "linearize": "linearize",
    "per_example_curvature": "per_example",
    "scan": "scan",
    "select": "select",
    "solve": "solve",
    "symmetry": "curvature",
}
__all__ = [
    "GaussNewton",
    "Hessian",
    "Sum",
    "U2ATrainer",
    "answer_logps",
    "bilevel",
    "dual",
    "ggnvp",
    "gradient",
    "hvp",
    "jvp_scores",
    "linearize",
    "per_example_curvature",
    "scan",
    "select",
    "solve",
    "symmetry",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'u2a' has no attribute {name!r}")
    return getattr(import_module(f"u2a.{_HOME[name]}"), name)


class _Package(ModuleType):
    """Keeps the import system from putting the module `u2a.dual` over the function `u2a.dual`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
