"""Attention of Hugging Face models that is right under double backward and `torch.func`, for code
that differentiates by itself (curvature packages, MAML):

    import u2a.compat
    model.set_attn_implementation("u2a_compat")

Flash kernels have no second derivative, and eager attention keeps [T, T] scores for it; this keeps
neither. `u2a_kernels.compat` has norms, activations and the loss head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from u2a_kernels import compat

NAME = "u2a_compat"


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [B, H, T, D] in, [B, T, H, D] out.

    Raises:
        ValueError: a mask, dropout, or fewer queries than keys (a cache).
    """
    if not getattr(module, "is_causal", True):
        raise ValueError(f"{NAME}: only causal attention is supported")
    out = compat.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, is_causal=True, scale=scaling, enable_gqa=True,
        window=sliding_window, softcap=softcap,
    )  # fmt: skip
    return out.transpose(1, 2), None


def no_mask(
    *, attention_mask: Tensor | None = None, allow_is_causal_skip: bool = True, **_: Any
) -> None:
    """Right-padded rows need none: real tokens never see the padding to their right.

    Raises:
        ValueError: left padding, packed rows, or a mask of the caller's own.
    """
    if not allow_is_causal_skip:
        raise ValueError(f"{NAME}: packed rows and other masks than the causal one are refused")
    if attention_mask is not None and bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
        raise ValueError(f"{NAME}: rows must be padded on the right, attention_mask says otherwise")


ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, no_mask)

__all__ = ["NAME"]
