"""The inner problem, its two solvers and the guards, on a two-layer Llama with a LoRA."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_unlearning import fitted_base, rows, tiny_base, tiny_peft
from transformers import TrainerCallback

from u2a.adapter import adapter_disabled, distance, restore, sequence_logps, snapshot
from u2a.errors import GuardError
from u2a.guard import RetainGuard
from u2a.inner import InnerProblem, inner_solve
from u2a.losses import Loss, get_loss
from u2a.losses.steps import harmonise
from u2a.trainer import U2AConfig, U2ATrainer, reference_logps
from u2a.tree import trainable

FORGET, RETAIN = rows(6, 1, "forget"), rows(9, 2, "retain")
WEIGHTS = torch.tensor([0.05, 0.3, 0.0, 0.1, 0.2, 0.15])


def config(tmp_path, **changes):
    base = {
        "output_dir": str(tmp_path),
        "loss": "npo",
        "anchor": 0.3,
        "retain_weight": 0.7,
        "per_device_train_batch_size": 8,
        "retain_batch_size": 16,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "guard": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    return U2AConfig(**(base | changes))


def problem_of(model, loss="npo", **changes):
    settings = {"retain": RETAIN, "retain_weight": 0.7, "anchor": 0.3} | changes
    return InnerProblem.build(model, FORGET, WEIGHTS, get_loss(loss), **settings)


def by_hand(model, problem, beta=0.1):
    """F from `model(...).logits`, row by row, independent of batches and parts."""

    def sequence(row):
        ids = torch.tensor([row.prompt_ids + row.answer_ids])
        logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        logp = logp[torch.arange(len(row) - 1), ids[0, 1:]]
        return logp[max(len(row.prompt_ids), 1) - 1 :]

    total = torch.zeros((), dtype=torch.float64)
    for i, row in enumerate(problem.forget):
        gap = sequence(row).sum() - problem.reference[i]
        total = total + problem.weights[i].double() * 2 / beta * torch.log1p(torch.exp(beta * gap))
    tokens = [sequence(row) for row in problem.retain]
    total = total - problem.retain_weight * torch.cat(tokens).mean()
    for name, p in trainable(model).items():
        total = total + problem.anchor / 2 * ((p - problem.start[name]) ** 2).sum()
    return total


def perturb(model, scale=0.05):
    torch.manual_seed(5)
    with torch.no_grad():
        for p in trainable(model).values():
            p += scale * torch.randn_like(p)


@pytest.mark.parametrize("batch_tokens", [8, 40, 8192])
def test_objective_and_gradient_match_row_by_row(batch_tokens):
    model = tiny_peft(dtype=torch.float64)
    problem = problem_of(model, batch_tokens=batch_tokens)
    perturb(model)
    want = by_hand(model, problem)
    grads = torch.autograd.grad(want, list(trainable(model).values()))
    got = problem.loss_and_grad(model)
    assert got == pytest.approx(want.item(), rel=1e-10)
    assert problem.value(model) == pytest.approx(want.item(), rel=1e-10)
    for p, g in zip(trainable(model).values(), grads, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-8, atol=1e-12)


def test_reference_is_the_base_model_and_keeps_frozen_factors():
    model, base = tiny_peft(train="b"), tiny_base()
    perturb(model, 0.3)
    want = torch.stack([sequence_logps(base, [r])[0] for r in FORGET])
    got = reference_logps(model, FORGET, 20)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (sequence_logps(model, FORGET) - want).abs().max() > 0.01
    assert all("lora_B" in n for n in trainable(model)), "peft must not thaw the A factors"
    with pytest.raises(ValueError, match="LlamaForCausalLM has no adapter to disable"):
        reference_logps(base, FORGET)
    torch.testing.assert_close(reference_logps(base, FORGET, reference_model=base), want)


@pytest.mark.parametrize("loss, anchor, lr", [("npo", 10.0, 0.05), ("graddiff", 3.0, 0.15)])
def test_trainer_reaches_the_optimum_of_lbfgs(tmp_path, loss, anchor, lr):
    model = tiny_peft(dtype=torch.float64, train="b")
    start = snapshot(model)
    problem = problem_of(model, loss, anchor=anchor)
    first = problem.value(model)
    solved = inner_solve(model, problem, tol=1e-7)
    best, moved = snapshot(model), distance(model, start)
    assert solved.converged and solved.value < first - 0.05
    assert problem.value(model) == pytest.approx(solved.value, rel=1e-12)
    restore(model, start)
    U2ATrainer(model, config(tmp_path, learning_rate=lr, max_steps=40), problem=problem).train()
    assert problem.value(model) - solved.value < 1e-6 * (first - solved.value)
    assert distance(model, best) < 1e-3 * moved


def step_gradient(tmp_path, **changes):
    """The gradient of the first optimizer step, and the loss the trainer reports for it."""
    grads = {}

    class Peek(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            grads.update({n: p.grad.clone() for n, p in trainable(model).items()})

    model = tiny_peft(dtype=torch.float64)
    given = {"batch_tokens": changes.pop("batch_tokens", 8192), **changes.pop("problem", {})}
    problem = problem_of(model, **given)
    perturb(model)
    trainer = U2ATrainer(model, config(tmp_path, **changes), problem=problem, callbacks=[Peek()])
    loss = trainer.train().training_loss
    return torch.cat([g.flatten() for g in grads.values()]), loss


def test_one_full_step_is_the_exact_gradient_in_every_split(tmp_path):
    model = tiny_peft(dtype=torch.float64)
    problem = problem_of(model)
    perturb(model)
    value = problem.loss_and_grad(model)
    want = torch.cat([p.grad.flatten() for p in trainable(model).values()])
    for micro, accumulate, retain, tokens in [(8, 1, 16, 8192), (8, 1, 16, 9), (1, 5, 9, 30)]:
        got, loss = step_gradient(
            tmp_path,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulate,
            retain_batch_size=retain,
            batch_tokens=tokens,
        )
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)
        assert loss == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("anchor", [0.3, 0.0])
def test_a_harmonised_step_is_that_of_both_whole_gradients(tmp_path, anchor):
    """In one batch or five; there is something to harmonise, or else it is the plain gradient."""
    model = tiny_peft(dtype=torch.float64)
    problem = problem_of(model, anchor=anchor)
    perturb(model)
    params, sides = trainable(model), []
    for parts, rest in ((problem.forget_parts(), 0.0), (problem.retain_parts(), anchor)):
        value = sum(part.value(model) for part in parts)
        if rest:
            value = value + problem.anchor_value(model)
        grads = torch.autograd.grad(value, list(params.values()), allow_unused=True)
        sides.append(dict(zip(params, grads, strict=True)))
    want = harmonise(sides[1], sides[0])
    plain = torch.cat([(sides[0][n] + sides[1][n]).flatten() for n in params])
    flat = torch.cat([g.flatten() for g in want.values()])
    assert (flat - plain).norm() > 0.01 * plain.norm()
    for micro, accumulate, retain, tokens in [(8, 1, 16, 8192), (1, 5, 9, 30)]:
        got, _ = step_gradient(
            tmp_path, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulate,
            retain_batch_size=retain, batch_tokens=tokens, harmonise=True,
            problem={"anchor": anchor},
        )  # fmt: skip
        torch.testing.assert_close(got, flat, rtol=1e-8, atol=1e-12)


def test_harmonising_wants_something_to_retain(tmp_path):
    model = tiny_peft()
    bare = problem_of(model, retain=(), retain_weight=0.0)
    with pytest.raises(ValueError, match="harmonise: wanted retain rows of positive weight"):
        U2ATrainer(model, config(tmp_path, harmonise=True), problem=bare)


def test_partial_steps_agree_between_splits_and_average_to_the_gradient(tmp_path):
    splits = [
        step_gradient(
            tmp_path,
            per_device_train_batch_size=4 // accumulate,
            retain_batch_size=4 // accumulate,
            gradient_accumulation_steps=accumulate,
        )[0]
        for accumulate in (1, 2, 4)
    ]
    torch.testing.assert_close(splits[0], splits[1], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(splits[0], splits[2], rtol=1e-8, atol=1e-12)

    model = tiny_peft(dtype=torch.float64)
    problem = problem_of(model, retain=RETAIN[:4])
    perturb(model)
    trainer = U2ATrainer(model, config(tmp_path), problem=problem)
    want = trainer.compute_loss(model, trainer._collate(list(range(9)))).item()
    singles = [
        trainer.compute_loss(model, trainer._collate([i, 5 + j])).item()
        for i in range(5)
        for j in range(4)
    ]
    assert sum(singles) / len(singles) == pytest.approx(want, rel=1e-10)
    assert want == pytest.approx(problem.value(model), rel=1e-10)


def test_weights_scale_the_forget_term_and_are_not_normalised():
    model = tiny_peft(dtype=torch.float64)
    alone = problem_of(model, "ga", retain_weight=0.0, anchor=0.0)
    assert alone.with_weights(3 * WEIGHTS).value(model) == pytest.approx(3 * alone.value(model))
    want = float((WEIGHTS * sequence_logps(model, FORGET) / counts()).sum())
    assert alone.value(model) == pytest.approx(want, rel=1e-6)
    assert alone.support == [0, 1, 3, 4, 5]


def counts():
    return torch.tensor([len(r.answer_ids) for r in FORGET])


def test_gradient_checkpointing_trains_the_same(tmp_path):
    finals = []
    for on in (False, True):
        model = tiny_peft()
        problem = problem_of(model)
        U2ATrainer(
            model, config(tmp_path, gradient_checkpointing=on, max_steps=3), problem=problem
        ).train()
        finals.append(torch.cat([p.detach().flatten() for p in trainable(model).values()]))
    torch.testing.assert_close(finals[0], finals[1], rtol=1e-5, atol=1e-6)


def test_blow_up_trips_the_guard_and_restores(tmp_path):
    sane = {"guard": True, "max_steps": 4, "guard_every": 2, "learning_rate": 0.05}
    model = tiny_peft(base=fitted_base(RETAIN))
    trainer = U2ATrainer(model, config(tmp_path, **sane), problem=problem_of(model))
    trainer.train()
    assert trainer.guard_callback.trip is None
    assert [r.step for r in trainer.guard_callback.readings] == [0, 1, 2, 4]
    assert trainer.guard_callback.readings[0].kl == pytest.approx(0, abs=1e-6)
    start = snapshot(model)

    wild = sane | {"learning_rate": 50.0}
    trainer = U2ATrainer(model, config(tmp_path, **wild), problem=problem_of(model))
    output = trainer.train()
    trip = trainer.guard_callback.trip
    assert output.global_step == trip.step == 1
    assert "retain" in trip.reason and "is over" in trip.reason
    assert distance(model, start) == 0

    fail = config(tmp_path, **wild, on_trip="fail")
    with pytest.raises(GuardError, match="step 1: retain"):
        U2ATrainer(model, fail, problem=problem_of(model)).train()
    assert distance(model, start) == 0


def test_guard_reads_exact_kl_and_perplexity():
    model = tiny_peft(dtype=torch.float64)
    perturb(model, 0.2)
    reading = RetainGuard(RETAIN, batch_tokens=20).read(model)
    kl, nll, ref_nll, tokens = 0.0, 0.0, 0.0, 0
    for row in RETAIN:
        ids = torch.tensor([row.prompt_ids + row.answer_ids])
        at = slice(len(row.prompt_ids) - 1, len(row) - 1)
        with torch.no_grad():
            now = model(input_ids=ids).logits[0, at].log_softmax(-1)
            with adapter_disabled(model):
                ref = model(input_ids=ids).logits[0, at].log_softmax(-1)
        kl += float((ref.exp() * (ref - now)).sum())
        target = torch.tensor(row.answer_ids)[:, None]
        nll -= float(now.gather(1, target).sum())
        ref_nll -= float(ref.gather(1, target).sum())
        tokens += len(row.answer_ids)
    assert reading.kl == pytest.approx(kl / tokens, rel=1e-9) and reading.kl > 1e-3
    assert reading.ppl_ratio == pytest.approx(math.exp((nll - ref_nll) / tokens), rel=1e-9)


def test_nan_is_exit_6_and_applies_no_step(tmp_path):
    model = tiny_peft()
    start = snapshot(model)
    broken = Loss("broken", "", "", lambda lp, beta: lp.mean() * math.nan, (0,) * 6)
    problem = InnerProblem.build(model, FORGET, WEIGHTS, broken, anchor=0.3)
    with pytest.raises(GuardError, match="broken loss is not finite on 5 rows: uid forget") as e:
        U2ATrainer(model, config(tmp_path), problem=problem).train()
    assert e.value.exit_code == 6
    with pytest.raises(GuardError, match="broken loss is not finite"):
        inner_solve(model, problem)
    assert distance(model, start) == 0

    def late(lp, beta):
        late.calls += 1
        return lp.mean() * (math.nan if late.calls > 2 else 1.0)

    problem = InnerProblem.build(model, FORGET, WEIGHTS, Loss("late", "", "", late, (0,) * 6))
    for solver in (
        lambda: inner_solve(model, problem),
        lambda: U2ATrainer(model, config(tmp_path, max_steps=5), problem=problem).train(),
    ):
        late.calls = 0
        with pytest.raises(GuardError, match="late loss is not finite"):
            solver()
        assert late.calls == 3 and distance(model, start) == 0, "two steps must be taken back"

    kink = Loss("kink", "", "", lambda lp, beta: (lp.mean() * 0).sqrt(), (0,) * 6)
    problem = InnerProblem.build(model, FORGET, WEIGHTS, kink, anchor=0.3)
    with pytest.raises(GuardError, match="gradient is not finite at step 1"):
        U2ATrainer(model, config(tmp_path), problem=problem).train()
    with pytest.raises(GuardError, match="gradient of F is not finite at evaluation 1"):
        inner_solve(model, problem)
    assert distance(model, start) == 0


def test_no_gradient_and_no_effect_are_errors(tmp_path):
    flat = Loss("flat", "", "", lambda lp, beta: lp.mean() * 0, (0,) * 6)
    model = tiny_peft()
    problem = InnerProblem.build(model, FORGET, WEIGHTS, flat)
    with pytest.raises(GuardError, match="no gradient reached the 12 trainable tensors"):
        U2ATrainer(model, config(tmp_path), problem=problem).train()
    with pytest.raises(GuardError, match="no effect: no parameter moved in 1 steps"):
        still = config(tmp_path, learning_rate=0.0)
        U2ATrainer(model, still, problem=problem_of(model)).train()


def test_datasets_and_weights_build_the_same_problem(tmp_path):
    model = tiny_peft()
    trainer = U2ATrainer(model, config(tmp_path), FORGET, weights=WEIGHTS, retain_dataset=RETAIN)
    assert trainer.problem.value(model) == pytest.approx(problem_of(model).value(model), rel=1e-6)


def test_wrong_input_is_named(tmp_path):
    model = tiny_peft()
    bad = WEIGHTS.clone()
    bad[3] = math.nan
    with pytest.raises(ValueError, match=r"got nan at row 3 \(uid forget3\)"):
        InnerProblem.build(model, FORGET, bad, get_loss("ga"))
    with pytest.raises(ValueError, match=r"wanted one per forget row, \[6\]; got \[5\]"):
        InnerProblem.build(model, FORGET, WEIGHTS[:5], get_loss("ga"))
    with pytest.raises(ValueError, match="no rows, but retain_weight is 1"):
        InnerProblem.build(model, FORGET, WEIGHTS, get_loss("ga"), retain_weight=1.0)
    with pytest.raises(ValueError, match="all 6 are zero, nothing to unlearn"):
        U2ATrainer(model, config(tmp_path), problem=problem_of(model).with_weights(0 * WEIGHTS))
    with pytest.raises(ValueError, match="logging_nan_inf_filter"):
        config(tmp_path, logging_nan_inf_filter=True)
    with pytest.raises(ValueError, match="got 'nop', nearest 'npo'"):
        config(tmp_path, loss="nop")


def test_unbounded_ascent_is_reported_not_called_solved():
    model = tiny_peft(train="b")
    problem = problem_of(model, "ga", retain_weight=0.0, anchor=0.0)
    result = inner_solve(model, problem, tol=1e-6, max_iter=15)
    assert not result.converged and result.grad_max > 1e-6
