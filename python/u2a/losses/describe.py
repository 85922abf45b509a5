"""docs/losses.md from the table itself: `python -m u2a.losses.describe > docs/losses.md`."""

from __future__ import annotations

from u2a.loss_names import PAIRED, SINGLE
from u2a.losses import LOSSES
from u2a.losses.base import Loss

PARTS = (
    (
        "u2a.losses.fdpg.FDPG",
        "sg(pi/q) (b - r) lp, r = -f'(pi/p), p = P/Z; six divergences; targets "
        "binary, rlhf, distributional",
        "f-DPG, arXiv 2302.08215",
        "js, window 1024",
    ),
    (
        "u2a.losses.steps.pmpo",
        "-alpha E_acc[lp] + (1 - alpha) E_rej[lp] + beta KL(pi_ref||pi)",
        "PMPO, arXiv 2410.04166",
        "",
    ),
    (
        "u2a.losses.steps.Dual",
        "L_f + lam (L_r - eps), lam <- max(0, lam + step (L_r - eps))",
        "PDU, arXiv 2506.05314",
        "lam 50, step 1, warm-up 5",
    ),
    (
        "u2a.losses.steps.harmonise",
        "g_r - <g_r, g_f>/|g_f|^2 g_f + g_f - <g_f, g_r>/|g_r|^2 g_r if <g_r, g_f> < 0",
        "LTU, arXiv 2407.10494",
        "off; on by unlearn.harmonise",
    ),
    (
        "u2a.losses.steps.mixed, calibrate",
        "(1 - a) theta_ref + a theta, the largest a with utility >= (1 - tau) utility(0)",
        "UWC, arXiv 2406.09179",
        "12 bisections",
    ),
    (
        "u2a.losses.steps.trace_weights, trace_loss, triage",
        "w = max(0, gain)/sum; sum w DPO(inverted) + sum w NPO(both) + alpha KL",
        "TRACE, arXiv 2511.02623",
        "alpha 0.1",
    ),
    (
        "u2a.losses.steps.c3po",
        "DPO + s1 NLL(unrelated) + s2 NLL(near scope), or distillation",
        "C3PO, arXiv 2402.10893",
        "s1 0.2, s2 0.1",
    ),
    (
        "u2a.losses.paired.neat_group",
        "sum over r_i < r_j of max(0, s_i - s_j), minus s of the best",
        "working form of NEAT, arXiv 2410.12194",
        "",
    ),
    (
        "u2a.losses.rowwise.topr",
        "-R lp, weight clip(pi/mu, low, high) where R < 0",
        "TOPR, arXiv 2503.14286",
        "[0, 1]",
    ),
    (
        "u2a.losses.reward_augmented.reward_augmented",
        "two goal-conditioned pairs of every scored pair; a data transform",
        "arXiv 2410.08067",
        "DPO beta 0.01",
    ),
)


def _cells(*cells: str) -> str:
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"


def _default(loss: Loss) -> str:
    found = {} if loss.beta is None else {"beta": loss.beta}
    return ", ".join(f"{k} {v:g}" for k, v in {**found, **loss.options}.items())


def _use(name: str) -> str:
    return "`unlearn.loss`" if name in SINGLE + PAIRED else "library"


def markdown() -> str:
    """The page as one string."""
    lines = [
        "# Losses",
        "",
        "Written by `python -m u2a.losses.describe`. All are minimised. lp = log pi(y|x) summed",
        "over the |y| answer tokens, lp_t one token's, p = exp(lp_t), r the reference's, y' the",
        "partner answer, sg = detached, z logits, h hidden states. `unlearn.loss`: can be named in",
        "a configuration, and its gains, solvers and training work (partners: `data.alternates`).",
        "`library`: a function for a training loop of your own.",
        "",
        _cells("name", "formula", "defaults", "needs", "use", "source"),
        _cells(*["---"] * 6),
    ]
    for name, loss in LOSSES.items():
        needs = ", ".join(sorted(loss.needs))
        lines.append(
            _cells(f"`{name}`", f"`{loss.formula}`", _default(loss), needs, _use(name), loss.source)
        )
    lines += ["", "## Steps, samplers, combinations and transforms", ""]
    lines += [_cells("function", "what", "defaults", "source"), _cells(*["---"] * 4)]
    lines += [_cells(f"`{n}`", f"`{w}`", d, s) for n, w, s, d in PARTS]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
