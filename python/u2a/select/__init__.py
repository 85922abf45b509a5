"""Which candidates to unlearn and how much: selectors and weight updates.

Most work on plain tensors; those that look at the model say so in their arguments.

A gain is dJ/dw_i: larger is better, so weights grow with it (the U2A authors' public code
reverses the sign of the multiplicative update, available as compat="official").
"""

from u2a.select.base import Round, Selection
from u2a.select.core import prompt_states, upcore
from u2a.select.gradients import (
    GEffect,
    cosine_gain,
    g_effect,
    g_effect_by_layer,
    gradient_norms,
    sketch_gain,
)
from u2a.select.quadratic import best_single_weight, matching_pursuit, quadratic_programme
from u2a.select.sets import Penalty, WeightSet
from u2a.select.simple import (
    METHODS,
    equal_weights,
    low_likelihood_k,
    low_reward_k,
    random_k,
    select,
    topk,
    uniform,
)
from u2a.select.updates import exponentiated_gradient, l1_proximal, projected_ascent, threshold
from u2a.select.worst_case import unlearner, worst_case

__all__ = [
    "METHODS",
    "GEffect",
    "Penalty",
    "Round",
    "Selection",
    "WeightSet",
    "best_single_weight",
    "cosine_gain",
    "equal_weights",
    "exponentiated_gradient",
    "g_effect",
    "g_effect_by_layer",
    "gradient_norms",
    "l1_proximal",
    "low_likelihood_k",
    "low_reward_k",
    "matching_pursuit",
    "projected_ascent",
    "prompt_states",
    "quadratic_programme",
    "random_k",
    "select",
    "sketch_gain",
    "threshold",
    "topk",
    "uniform",
    "unlearner",
    "upcore",
    "worst_case",
]
