"""Per-example gradient features of a language model: capture, store and query.

`features` gives them in memory, `u2a.scan(mode="index")` writes them, `Index` reads and scores.
"""

from u2a.index.build import Settings, features, query
from u2a.index.engine import Capture, capture
from u2a.index.hvp import hvp_features
from u2a.index.modules import tokens
from u2a.index.packed import Packed, pack
from u2a.index.reader import Index
from u2a.index.spec import Full, Kronecker, Sketch

__all__ = [
    "Capture",
    "Full",
    "Index",
    "Kronecker",
    "Packed",
    "Settings",
    "Sketch",
    "capture",
    "features",
    "hvp_features",
    "pack",
    "query",
    "tokens",
]
