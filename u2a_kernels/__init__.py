"""Fused torch ops for per-example gradients, tangents and unlearning losses.

Ops are defined in Python and answer everywhere; the compiled libraries only add kernels.
"""

import torch as _torch

from u2a_kernels._library import cuda_library_path as _cuda_library_path
from u2a_kernels.ops.dual_attention import dual_attention
from u2a_kernels.ops.dual_glu import dual_act, dual_glu
from u2a_kernels.ops.dual_glu.named import (
    dual_geglu,
    dual_gelu,
    dual_relu2,
    dual_silu,
    dual_swiglu,
)
from u2a_kernels.ops.dual_layer_norm import dual_layer_norm
from u2a_kernels.ops.dual_linear import dual_linear
from u2a_kernels.ops.dual_linear_cross_entropy import dual_linear_cross_entropy
from u2a_kernels.ops.dual_lora_linear import dual_lora_linear
from u2a_kernels.ops.dual_rms_norm import dual_rms_norm
from u2a_kernels.ops.dual_softmax import dual_softmax
from u2a_kernels.ops.grad_dot import grad_dot
from u2a_kernels.ops.grad_gram import grad_gram
from u2a_kernels.ops.grad_project import Rademacher, grad_project, rademacher
from u2a_kernels.ops.grad_sketch import grad_sketch
from u2a_kernels.ops.grad_sq_norm import grad_sq_norm
from u2a_kernels.ops.linear_cross_entropy import linear_cross_entropy
from u2a_kernels.ops.linear_logp import linear_logp

__version__ = "0.1.0"
__all__ = [
    "Rademacher",
    "dual_act",
    "dual_attention",
    "dual_geglu",
    "dual_gelu",
    "dual_glu",
    "dual_layer_norm",
    "dual_linear",
    "dual_linear_cross_entropy",
    "dual_lora_linear",
    "dual_relu2",
    "dual_rms_norm",
    "dual_silu",
    "dual_softmax",
    "dual_swiglu",
    "grad_dot",
    "grad_gram",
    "grad_project",
    "grad_sketch",
    "grad_sq_norm",
    "linear_cross_entropy",
    "linear_logp",
    "rademacher",
]

try:
    import u2a_kernels._C as _C
except ModuleNotFoundError:
    _C = None  # type: ignore[assignment]

if (_cuda_library := _cuda_library_path()) is not None:
    _torch.ops.load_library(_cuda_library)
