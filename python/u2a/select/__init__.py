"""Which candidates to unlearn and how much: selectors and weight updates on plain tensors.

A gain is dJ/dw_i: larger is better, so weights grow with it (the U2A authors' public code
reverses the sign of the multiplicative update, available as compat="official").
"""

from u2a.select.base import Round, Selection
from u2a.select.quadratic import best_single_weight, matching_pursuit, quadratic_programme
from u2a.select.sets import Penalty, WeightSet
from u2a.select.simple import (
    METHODS,
    equal_weights,
    low_likelihood_k,
    random_k,
    select,
    topk,
    uniform,
)
from u2a.select.updates import exponentiated_gradient, l1_proximal, projected_ascent, threshold

__all__ = [
    "METHODS",
    "Penalty",
    "Round",
    "Selection",
    "WeightSet",
    "best_single_weight",
    "equal_weights",
    "exponentiated_gradient",
    "l1_proximal",
    "low_likelihood_k",
    "matching_pursuit",
    "projected_ascent",
    "quadratic_programme",
    "random_k",
    "select",
    "threshold",
    "topk",
    "uniform",
]
