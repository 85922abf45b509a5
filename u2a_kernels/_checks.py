"""The door: every public op checks its arguments once, here, in words.

A message names the op, the argument, what was wanted (letters and numbers) and what came.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shape(t: Tensor) -> str:
    return f"[{', '.join(str(s) for s in t.shape)}]"


def wanted(op: str, name: str, want: str, got: object) -> ValueError:
    return ValueError(f"{op}: {name} must be {want}, got {got}")


def check_floats(op: str, **tensors: Tensor | None) -> None:
    """All given tensors are floating point, of one dtype and device, no forward-AD tangents."""
    first: tuple[str, Tensor] | None = None
    for name, t in tensors.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(t).__name__}")
        if t.dtype not in FLOATS:
            raise TypeError(
                f"{op}: {name} must be float32, bfloat16, float16 or float64, got {t.dtype}"
            )
        if first is None:
            first = (name, t)
        elif t.dtype != first[1].dtype:
            raise TypeError(
                f"{op}: {name} must have the dtype of {first[0]}, {first[1].dtype}, got {t.dtype}"
            )
        elif t.device != first[1].device:
            raise ValueError(
                f"{op}: {name} must be on the device of {first[0]}, {first[1].device}, "
                f"got {t.device}"
            )
        refuse_forward_ad(op, name, t)


def refuse_forward_ad(op: str, name: str, t: Tensor) -> None:
    """A custom op under forward-mode AD would return a zero tangent without a word."""
    if forward_ad.unpack_dual(t).tangent is not None:
        raise RuntimeError(
            f"{op}: {name} carries a forward-mode AD tangent, which a custom op would silently "
            "drop. Use u2a.dual / the dual_* ops for tangents."
        )


def check_dim(op: str, name: str, t: Tensor, want: str, ndim: int | tuple[int, ...]) -> None:
    if t.ndim not in (ndim if isinstance(ndim, tuple) else (ndim,)):
        raise wanted(op, name, want, shape(t))


def check_size(op: str, name: str, t: Tensor, want: str, sizes: tuple[int, ...]) -> None:
    """`want` spells the shape in letters, `sizes` in numbers."""
    if tuple(t.shape) != tuple(sizes):
        numbers = ", ".join(str(s) for s in sizes)
        raise wanted(op, name, f"{want} = [{numbers}]", shape(t))


def check_offsets(op: str, offsets: Tensor, n: int, name: str = "offsets", rows: str = "x") -> None:
    """`[B+1]` int32/int64: 0 first, N last, non-decreasing. Values are checked on the CPU only."""
    if not isinstance(offsets, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(offsets).__name__}")
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} must be int32 or int64, got {offsets.dtype}")
    if offsets.ndim != 1 or offsets.shape[0] < 1:
        raise wanted(op, name, "[B+1] with B >= 0", shape(offsets))
    if offsets.device.type != "cpu" or torch.compiler.is_compiling() or _is_fake(offsets):
        return
    ends = (int(offsets[0]), int(offsets[-1]))
    if ends != (0, n):
        raise wanted(
            op, name, f"0 first and N = {n} (rows of {rows}) last", f"{ends[0]} and {ends[1]}"
        )
    falls = (offsets[1:] < offsets[:-1]).nonzero()
    if len(falls):
        i = int(falls[0]) + 1
        got = f"{int(offsets[i - 1])} then {int(offsets[i])} at {i}"
        raise wanted(op, name, "non-decreasing", got)


def check_targets(op: str, targets: Tensor, n: int, vocab: int, name: str = "targets") -> None:
    """`[N]` int64 in [0, V), or -100 for an ignored token. Values are checked on the CPU only."""
    if not isinstance(targets, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(targets).__name__}")
    if targets.dtype != torch.int64:
        raise TypeError(f"{op}: {name} must be int64, got {targets.dtype}")
    check_size(op, name, targets, "[N]", (n,))
    if targets.device.type != "cpu" or torch.compiler.is_compiling() or _is_fake(targets):
        return
    wrong = (((targets < 0) & (targets != -100)) | (targets >= vocab)).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise wanted(op, name, f"in [0, V = {vocab}) or -100", f"{int(targets[at])} at {at}")


def check_softcap(op: str, softcap: float | None) -> None:
    if softcap is not None and not 0 < softcap < float("inf"):
        raise wanted(op, "softcap", "None or a positive number", softcap)


def _is_fake(t: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(t, FakeTensor) or t.device.type == "meta"
