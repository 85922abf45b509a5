"""Losses over the vocabulary and over hidden states: vectors, chunks, masks, memory, references."""

from __future__ import annotations

import pytest
import torch
from tiny_unlearning import rows, tiny_base, tiny_peft
from torch import nn

from u2a.adapter import adapter_disabled
from u2a.batch import collate
from u2a.losses import LOSSES
from u2a.losses.base import HIDDEN, REFERENCE, VOCABULARY
from u2a.losses.hidden import control_vector, layer_states, rmu, rmu_loss
from u2a.losses.vocabulary import ceu, head_loss, kl, pdu, undial, vocabulary_loss

F64 = torch.float64
NAMES = [n for n, loss in LOSSES.items() if VOCABULARY in loss.needs]
BATCH = collate(rows(5, seed=3))


def random_logits(n: int, v: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, v, generator=torch.Generator().manual_seed(seed), dtype=F64) * 2


def token_fn(name: str):
    loss = LOSSES[name]
    return lambda z, target, ref: loss.fn(z, target, ref, beta=loss.beta or 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_vector_and_gradcheck(name):
    v, fn = LOSSES[name].vector, token_fn(name)
    z = torch.tensor([v.logits], dtype=F64)
    ref = None if v.ref_logits is None else torch.tensor([v.ref_logits], dtype=F64)
    assert fn(z, torch.tensor([v.target]), ref).item() == pytest.approx(v.value, rel=1e-9)
    z, ref = random_logits(3, 5), random_logits(3, 5, 1)
    target, z = torch.tensor([4, 0, 2]), z.requires_grad_()
    if name != "ceu":  # its target is its own detached prediction
        assert torch.autograd.gradcheck(lambda z: fn(z, target, ref), z)
        assert torch.autograd.gradgradcheck(lambda z: fn(z, target, ref), z)


def test_ceu_gradient_and_minimum():
    z = random_logits(2, 4).requires_grad_()
    target = torch.tensor([1, 3])
    (g,) = torch.autograd.grad(ceu(z, target, None).sum(), z)
    p = z.softmax(-1).detach()
    q = p.scatter(1, target[:, None], 0)
    torch.testing.assert_close(g, p - q / q.sum(-1, keepdim=True))
    assert (g.gather(1, target[:, None]) > 0).all()
    with pytest.raises(ValueError, match="vocabulary of 2 or more, got 1"):
        ceu(z[:, :1], target * 0, None)


def test_token_functions_at_their_optimum():
    ref, target = random_logits(3, 6), torch.tensor([0, 5, 2])
    assert kl(ref + 1.5, target, ref).abs().max() < 1e-12
    assert pdu(torch.full((2, 7), 3.0), target[:2], None).tolist() == [0.0, 0.0]
    best = ref.scatter_add(1, target[:, None], torch.full((3, 1), -10.0, dtype=F64))
    z = best.requires_grad_()
    (g,) = torch.autograd.grad(undial(z, target, ref).sum(), z)
    assert g.abs().max() < 1e-12
    hot = kl(random_logits(3, 6, 2), target, ref, beta=50.0)  # T^2 KL stays of one order
    assert 0.1 < (hot / kl(random_logits(3, 6, 2), target, ref)).median() < 10


@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits_stay_finite(name):
    z = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0], [-1e4, 1e4, 1e4]]).requires_grad_()
    for target in ([0, 0, 0], [2, 1, 1]):
        value = token_fn(name)(z, torch.tensor(target), z.detach().flip(0))
        (g,) = torch.autograd.grad(value.sum(), z)
        assert value.isfinite().all() and g.isfinite().all()


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("name", NAMES)
def test_chunks_change_nothing(name, cap):
    torch.manual_seed(0)
    head, ref_head = (nn.Linear(4, 9).double() for _ in range(2))
    h, ref = random_logits(7, 4), random_logits(7, 4, 1)
    target, fn = torch.arange(7), token_fn(name)

    def total(chunk: int) -> list[torch.Tensor]:
        leaf = h.clone().requires_grad_()
        each = head_loss(
            leaf, head, target, fn, ref=ref, ref_head=ref_head, softcap=cap, chunk=chunk
        )
        grads = torch.autograd.grad(each.square().sum(), [leaf, head.weight], create_graph=True)
        (again,) = torch.autograd.grad(grads[0].square().sum(), leaf)
        return [each, *grads, again]

    for got, want in zip(total(2), total(100), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert ref_head.weight.grad is None
    assert head_loss(h[:0], head, target[:0], fn, ref=ref[:0]).shape == (0,)


def test_no_more_than_a_chunk_of_logits_is_held():
    seen, held = [], []

    def fn(z, target, ref):
        seen.append(z.shape[0])
        return z.square().mean(-1)

    head = nn.Linear(4, 1000).double()
    h = random_logits(50, 4).requires_grad_()

    def pack(t: torch.Tensor) -> torch.Tensor:
        held.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = head_loss(h, head, torch.zeros(50, dtype=torch.int64), fn, chunk=8).sum()
    assert max(seen) == 8 and len(seen) == 7
    assert max(held, default=0) < 8 * 1000, "no logits may be kept for the backward pass"
    value.backward()
    assert len(seen) == 14


@pytest.mark.parametrize("name", NAMES)
def test_on_a_model_against_whole_logits(name):
    model, reference = tiny_base(0, F64), tiny_base(1, F64).requires_grad_(False)
    loss = LOSSES[name]
    got = vocabulary_loss(model, BATCH, loss, reference=reference, chunk=3)
    skip = int(name == "ceu")
    z, zr = (m(input_ids=BATCH.ids).logits for m in (model, reference))
    for b in range(len(BATCH)):
        at = BATCH.answer[b].nonzero().flatten()[skip:]
        each = token_fn(name)(z[b, at - 1], BATCH.ids[b, at], zr[b, at - 1])
        want = each.mean() if len(at) else torch.zeros((), dtype=F64)
        torch.testing.assert_close(got[b], want)
    got.sum().backward()
    assert all(p.grad is None for p in reference.parameters())


def test_padding_never_matters():
    model, reference = tiny_base(0, F64), tiny_base(1, F64)
    data = rows(5, seed=3)
    for name in NAMES:
        together = vocabulary_loss(model, collate(data), LOSSES[name], reference=reference)
        for i, row in enumerate(data):
            alone = vocabulary_loss(model, collate([row]), LOSSES[name], reference=reference)
            torch.testing.assert_close(alone[0], together[i])


def test_needs_are_asked_for():
    model = tiny_base(0, F64)
    for name in NAMES:
        if REFERENCE in LOSSES[name].needs:
            with pytest.raises(ValueError, match=f"{name}: wants a reference model"):
                vocabulary_loss(model, BATCH, LOSSES[name])
    with pytest.raises(ValueError, match="undial: wants the reference model's logits"):
        undial(random_logits(1, 3), torch.tensor([0]), None)
    h, head = random_logits(3, 4), nn.Linear(4, 5).double()
    with pytest.raises(ValueError, match=r"got \[3, 4\], \[2\], None"):
        head_loss(h, head, torch.zeros(2, dtype=torch.int64), pdu)
    with pytest.raises(ValueError, match="chunk must be >= 1"):
        head_loss(h, head, torch.zeros(3, dtype=torch.int64), pdu, chunk=0)


def test_every_loss_of_the_table_has_its_vector_tried():
    """The others by `test_losses.test_vector`, which takes all that are wired."""
    assert {n for n, loss in LOSSES.items() if not loss.wired} == {*NAMES, "rmu"}


def test_rmu_vector_and_control():
    v = LOSSES["rmu"].vector
    assert LOSSES["rmu"].needs == {HIDDEN, REFERENCE}
    h, towards = torch.tensor([v.hidden]), torch.tensor([v.ref_hidden])
    assert rmu(h, towards).item() == v.value
    u = control_vector(64, 2.0, seed=5)
    assert u.norm().item() == pytest.approx(2.0) and (u >= 0).all()
    assert torch.equal(u, control_vector(64, 2.0, seed=5))
    assert not torch.equal(u, control_vector(64, 2.0, seed=6))
    leaf = random_logits(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda h: rmu(h, u[:4]), leaf)


def test_rmu_on_a_model():
    model, reference = tiny_base(0, F64), tiny_base(1, F64)
    u = control_vector(32).double()
    states = model(input_ids=BATCH.ids, output_hidden_states=True).hidden_states[1]
    held = reference(input_ids=BATCH.ids, output_hidden_states=True).hidden_states[1]
    hooks = len(model.model.layers[0]._forward_hooks)
    forget = rmu_loss(model, BATCH, 0, control=u)
    retain = rmu_loss(model, BATCH, 0, reference=reference)
    for b in range(len(BATCH)):
        mask = BATCH.answer[b]
        for got, to in ((forget[b], u), (retain[b], held[b][mask])):
            want = (states[b][mask] - to).square().mean(-1).mean()
            torch.testing.assert_close(got, want)
    (forget.sum() + retain.sum()).backward()
    layers = model.model.layers
    assert layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    assert layers[1].mlp.up_proj.weight.grad is None
    assert all(p.grad is None for p in reference.parameters())
    assert len(layers[0]._forward_hooks) == hooks
    again = model(input_ids=BATCH.ids, output_hidden_states=True).hidden_states
    assert len(again) == 3 and torch.equal(again[1], states), "stopping half-way leaves no trace"
    with pytest.raises(ValueError, match="one of the 2 decoder layers, got 2"):
        layer_states(model, BATCH, 2)
    with pytest.raises(ValueError, match="give control .* or reference"):
        rmu_loss(model, BATCH, 0)


def test_kl_to_the_base_of_an_adapter_is_zero_at_the_start():
    model = tiny_peft(dtype=F64)
    with torch.no_grad():
        base = tiny_base(0, F64)
        found = vocabulary_loss(model, BATCH, LOSSES["kl_retain"], reference=base)
    assert found.abs().max() < 1e-12
    with adapter_disabled(model):
        h, _ = layer_states(model, BATCH, 1)
    torch.testing.assert_close(h, layer_states(base, BATCH, 1)[0])
