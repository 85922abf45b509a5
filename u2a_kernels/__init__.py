"""Fused torch ops for per-example gradients, tangents and unlearning losses.

Ops are defined in Python and answer everywhere; the compiled libraries only add kernels.
"""

import torch as _torch

from u2a_kernels.ops.dual_attention import dual_attention
from u2a_kernels.ops.dual_gelu import dual_gelu
from u2a_kernels.ops.dual_layer_norm import dual_layer_norm
from u2a_kernels.ops.dual_linear import dual_linear
from u2a_kernels.ops.dual_linear_cross_entropy import dual_linear_cross_entropy
from u2a_kernels.ops.dual_rms_norm import dual_rms_norm
from u2a_kernels.ops.dual_swiglu import dual_swiglu
from u2a_kernels.ops.grad_dot import grad_dot

__version__ = "0.1.0"
__all__ = [
    "dual_attention",
    "dual_gelu",
    "dual_layer_norm",
    "dual_linear",
    "dual_linear_cross_entropy",
    "dual_rms_norm",
    "dual_swiglu",
    "grad_dot",
]

try:
    import u2a_kernels._C as _C
except ModuleNotFoundError:
    _C = None  # type: ignore[assignment]

if _C is not None and _torch.version.cuda is not None and _C.cuda_archs:
    from pathlib import Path as _Path

    for _so in _Path(__file__).parent.glob("_C_cuda*.so"):
        _torch.ops.load_library(_so)
