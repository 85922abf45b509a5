"""Data parallel models: what DistributedDataParallel and FSDP2 (`fully_shard`) mean to u2a.

The wrapper decides. With a model in DDP, or sharded by `fully_shard` (layers, then the root), every
rank brings batches of its own, and `gradient`, `hvp`, `ggnvp`, `quadratic`, hence `GaussNewton`,
`Hessian` and `solve`, are those of the rows of all ranks, the same result on each: sums over ranks,
means over all rows. Scores, and `scan`, are those of a rank's own rows. Every rank makes the same
calls, under FSDP2 with the same number of batches. Without a wrapper nothing is communicated.

Trees of a model in DDP have the names of the model inside. Those of an FSDP2 model hold DTensors
placed as the parameters are; `solve` works on whole vectors on every rank. A layer's directions are
gathered in its forward and stay for its backward (under activation checkpointing, not in between).
Everything else in u2a refuses such a model: `linearize`, an index, K-FAC, `EmpiricalFisher`, losses
with a head of their own. Of an FSDP2 model the object that `u2a.dual` yields is not to be called:
`dual_answer_logps` and the products run it where parameters are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from u2a.dual_modules import Handler, Site


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(m, FSDPModule) for m in model.modules())


def plain(cls: type) -> type:
    """A module's class, without the one that `fully_shard` mixes in."""
    return cls.__bases__[1] if issubclass(cls, FSDPModule) else cls


def whole(t: Tensor) -> Tensor:
    """A DTensor gathered on every rank; others as they are."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def whole_like(t: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """A gathered direction in the dtype in which its parameter computes."""
    return t if t is None or parameter is None else whole(t).to(parameter.dtype)


def placed_like(t: Tensor, like: Tensor) -> Tensor:
    """`t` in the dtype and on the device of `like`, and sharded as it is; the same on all ranks."""
    t = t.to(like.device, like.dtype)
    if not isinstance(like, DTensor):
        return t
    return distribute_tensor(t, like.device_mesh, like.placements, src_data_rank=None)


def _groups(model: nn.Module) -> list[Any]:
    """The process groups whose ranks hold different rows, one per dimension of the mesh."""
    if isinstance(model, DistributedDataParallel):
        return [model.process_group]
    sharded = next((p for p in model.parameters() if isinstance(p, DTensor)), None)
    return [] if sharded is None else list(sharded.device_mesh.get_all_groups())


def is_parallel(model: nn.Module) -> bool:
    """Whether the products of `model` are sums over ranks."""
    return bool(_groups(model))


def summed(model: nn.Module, *values: float) -> list[float]:
    """`values` summed over the ranks of `model`."""
    groups = _groups(model)
    if not groups:
        return list(values)
    t = torch.tensor(values, dtype=torch.float64, device=next(model.parameters()).device)
    for group in groups:
        dist.all_reduce(t, group=group)
    return t.tolist()  # type: ignore[no-any-return]


def all_rows(model: nn.Module, batches: Sequence[Any]) -> int:
    """Rows in the batches of all ranks. Leaves every parameter of an FSDP2 model a DTensor.

    Raises:
        ValueError: ranks of an FSDP2 model with different numbers of batches; they would wait for
            each other for ever.
    """
    reshard(model)
    n = len(batches)
    rows, ranks, total, squares = summed(model, sum(map(len, batches)), 1, n, n * n)
    if is_sharded(model) and ranks * squares != total * total:
        raise ValueError(
            f"a model sharded by FSDP2 needs as many batches on every rank: got {n} on this one, "
            f"{total / ranks:g} in the mean; a row of weight 0 may fill one"
        )
    return int(rows)


def sum_(model: nn.Module, tree: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tree` summed over the ranks of a model in DDP, in place; FSDP2 did so in its backward."""
    if isinstance(model, DistributedDataParallel):
        for t in tree.values():
            dist.all_reduce(t, group=model.process_group)
    return tree


def gradients(total: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{name: d total / d parameter}, parameters without a path left out.

    FSDP2 gathers and reduces in hooks of `.backward()`, which leaves the mean over the ranks in
    `.grad`: taken as a sum, and what was in `.grad` before is put back.
    """
    if not any(isinstance(p, DTensor) for p in params.values()):
        found = torch.autograd.grad(total, list(params.values()), allow_unused=True)
        return {n: g for n, g in zip(params, found, strict=True) if g is not None}
    before = {n: p.grad for n, p in params.items()}
    try:
        for p in params.values():
            p.grad = None
        total.backward()  # type: ignore[no-untyped-call]
        return {
            n: p.grad * p.device_mesh.size()  # type: ignore[attr-defined]
            for n, p in params.items()
            if p.grad is not None
        }
    finally:
        for n, p in params.items():
            p.grad = before[n]


def reshard(model: nn.Module) -> None:
    """FSDP2 keeps the root's parameters whole after a forward; here they become DTensors again."""
    for m in model.modules():
        if isinstance(m, FSDPModule):
            m.reshard()


def inside(model: nn.Module, part: nn.Module, f: Callable[..., Any], *args: Tensor) -> Any:
    """f(*args), tensors in and out; where FSDP2 shards modules of `model` that hold `part`, run as
    their forward: parameters are whole only there, and FSDP2 has to see what leaves."""
    holders = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for m in reversed([m for m in holders if any(x is part for x in m.modules())]):
        f = partial(_as_forward, m, f)
    return f(*args)


def _as_forward(module: nn.Module, f: Callable[..., Any], *args: Tensor) -> Any:
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = f
    try:
        return module(*args)
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


def gathering(handler: Handler, module: nn.Module, site: Site) -> dict[str, Any]:
    """What `handler` sets on a module whose parameters FSDP2 makes whole in its forward alone:
    there the handler is asked again, and gets whole directions, in the order it asked for them."""
    if not any(isinstance(p, DTensor) for p in module.parameters()):
        return handler(module, site)
    asked: list[Tensor | None] = []
    answer = site.tangent

    def noted(parameter: Tensor | None) -> Tensor | None:
        asked.append(answer(parameter))
        return asked[-1]

    found = _ask(handler, module, site, noted)
    if "forward" not in found:
        return found

    def forward(*args: Any, **kwargs: Any) -> Any:
        left = iter(asked)

        def gathered(parameter: Tensor | None) -> Tensor | None:
            return whole_like(next(left), parameter)

        return _ask(handler, module, site, gathered)["forward"](*args, **kwargs)

    return {**found, "forward": forward}


def _ask(handler: Handler, module: nn.Module, site: Site, tangent: Any) -> dict[str, Any]:
    site.__dict__["tangent"] = tangent
    try:
        return handler(module, site)
    finally:
        del site.__dict__["tangent"]
