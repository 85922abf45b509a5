"""RMU: misdirect a layer's hidden states on what is to be forgotten, hold them elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from u2a.batch import AnswerLogps, Batch
from u2a.dual import parts
from u2a.losses.base import HIDDEN, REFERENCE, Loss, Vector


def control_vector(size: int, scale: float = 2.0, seed: int = 0) -> Tensor:
    """`[d]` float32: uniform in [0, 1), normalised, times `scale`; the same for the same seed."""
    u = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    return u * (scale / u.norm())


def rmu(h: Tensor, towards: Tensor, beta: float = 0.0) -> Tensor:
    """||h - towards||^2 / d per token, `[n]`: `towards` is the control vector or h's reference."""
    return (h - towards.detach().to(h)).square().mean(-1)


class _Found(Exception):
    pass


@contextmanager
def _stopping(layer: nn.Module, found: list[Tensor]) -> Iterator[None]:
    def hook(_: nn.Module, __: object, output: object) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)  # type: ignore[arg-type]
        raise _Found

    handle = layer.register_forward_hook(hook)
    try:
        yield
    except _Found:
        pass
    finally:
        handle.remove()


def layer_states(model: nn.Module, batch: Batch, layer: int) -> tuple[Tensor, Tensor]:
    """Hidden states after decoder layer `layer` (0 the first) at answer tokens, `[n, d]`, and the
    row of each `[n]`. Later layers are not run. Raises ValueError for a layer there is not."""
    backbone, _ = parts(model)
    layers = getattr(backbone, "layers", None)
    layers = getattr(backbone, "h", None) if layers is None else layers
    if layers is None or not 0 <= layer < len(layers):
        count = 0 if layers is None else len(layers)
        raise ValueError(f"layer: wanted one of the {count} decoder layers, got {layer}")
    device = next(model.parameters()).device
    found: list[Tensor] = []
    with _stopping(layers[layer], found):
        backbone(input_ids=batch.ids.to(device), use_cache=False)
    row, position = batch.answer.to(device).nonzero(as_tuple=True)
    return found[0][row, position], row


def rmu_loss(
    model: nn.Module,
    batch: Batch,
    layer: int,
    *,
    control: Tensor | None = None,
    reference: nn.Module | None = None,
) -> Tensor:
    """`[B]`, mean over each row's answer tokens; gradients flow into layers up to `layer`.

    Give `control` for rows to forget (`control_vector`), `reference` for rows to retain: the
    frozen model whose states are held.
    """
    if (control is None) == (reference is None):
        raise ValueError("rmu_loss: give control (rows to forget) or reference (rows to retain)")
    h, row = layer_states(model, batch, layer)
    if reference is None:
        assert control is not None
        towards = control
    else:
        with torch.no_grad():
            towards, _ = layer_states(reference, batch, layer)
    return AnswerLogps(rmu(h, towards), row, batch.answer.sum(1).to(row.device)).mean()


LOSSES = (
    Loss(
        "rmu", "mean_t |h_l - c u|^2/d on rows to forget, mean_t |h_l - h_l,ref|^2/d on rows to "
        "retain; layer 7, c = 2", "RMU, arXiv 2403.03218", rmu,
        Vector(1.3125, hidden=(1.0, 2.0, 0.0, 1.0), ref_hidden=(0.0, 1.0, 1.0, -0.5)),
        needs=frozenset({HIDDEN, REFERENCE}), retain_weight=1.0,
    ),
)  # fmt: skip
