"""One outer step, ours against the U2A authors' procedure: direction grad J, inverse-Hessian solve,
scores of 1024 candidates with answers of 64 to 128 tokens.

`python benchmarks/bench_outer_step.py [--help]` trains a small model on two made-up languages
(answers of one are wanted, of the other not), interleaves the stages of every procedure in one run
and prints CPU seconds (on a GPU seconds), peak memory and agreement of the scores:
- authors: batch-1 loop and flat gradients, H = I (`_authors.py`);
- loop + double backward: the same loop after the same CG solve as ours, by double backward;
- ours: `u2a.outer.Outer` with CG on the Gauss-Newton matrix, EK-FAC, H = I, and a sketch index.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from _authors import DoubleBackward
from _measure import peak_mb
from _outer_setting import DEVICE, Setting

from u2a.evaluate import spearman
from u2a.index import Sketch, query
from u2a.losses import LOSSES, dpo_objective
from u2a.scan import scan
from u2a.solve import solve
from u2a.tree import numel, trainable


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--family", choices=["llama", "gpt2"], default="llama")
    for name, value in (
        ("layers", 3), ("hidden", 96), ("vocab", 1024), ("candidates", 1024), ("pairs", 32),
        ("retain", 32), ("batch-tokens", 4096), ("train-steps", 60), ("chunks", 8),
        ("max-iter", 20), ("threads", 1),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--full", action="store_true", help="all parameters, not LoRA r=8")
    parser.add_argument("--damping", default="rel:0.1")
    return parser.parse_args()


def clocked(call):
    """(result, seconds): CPU time of this process, on a GPU wall time to its end."""
    if DEVICE == "cpu":
        began = time.process_time()
        return call(), time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    found = call()
    torch.cuda.synchronize()
    return found, time.perf_counter() - began


SOLVERS = {
    "CG": dict(method="cg"),
    "CG, EK-FAC": dict(method="cg", precond="ekfac"),
    "EK-FAC": dict(method="ekfac"),
    "H = I": dict(method="identity", damping=1.0),
}


class Step:
    """Every stage of every procedure, timed; a stage's seconds are the median of its rounds."""

    def __init__(self, setting):
        self.s, self.a = setting, setting.a
        self.seconds = {}
        self.like = trainable(setting.model)

    def timed(self, name, call):
        found, spent = clocked(call)
        self.seconds.setdefault(name, []).append(spent)
        print(f"  {name}: {spent:.2f} s", file=sys.stderr, flush=True)
        return found

    def of(self, name):
        values = sorted(self.seconds[name])
        return values[len(values) // 2]

    def directions(self, rounds=3):
        s = self.s
        s.authors.direction(s.pairs[:8])
        for _ in range(rounds):
            self.flat = self.timed("authors direction", lambda: s.authors.direction(s.pairs))
            J = self.timed("reference", s.objective)
            self.g = self.timed("direction", lambda J=J: J.gradient(s.model))

    def solves(self):
        a, operator = self.a, self.s.outer.operator(torch.zeros(len(self.s.forget)))
        options = dict(tol=1e-4, max_iter=a.max_iter, damping=a.damping)
        self.found = {}
        for name, how in SOLVERS.items():
            more = {"tol": 1e-4, "max_iter": a.max_iter} if how["method"] == "cg" else {}
            self.found[name] = self.timed(
                f"solve {name}",
                lambda how=how, m=more: solve(
                    operator, self.g, **({"damping": a.damping} | how | m)
                ),
            )
        mine = self.found["CG"]
        ((_, real),) = operator.terms
        peer = DoubleBackward(self.s.model, real.batches)
        v = mine.x
        near = max(
            float((x - y).abs().max() / y.abs().max())
            for x, y in zip(peer.matvec(v).values(), real.matvec(v).values(), strict=True)
        )
        print(f"double backward's product is ours to {near:.1e}")
        options["damping"] = float(mine.damping)
        self.timed("solve double backward", lambda: solve(peer, self.g, **options))

    def candidates(self):
        """The pool in chunks of neighbours by length, each by every procedure in turn."""
        s, a = self.s, self.a
        size = -(-len(s.forget) // a.chunks)
        kept = {"authors": [], "CG": [], "EK-FAC": [], "H = I": []}
        s.authors.scores(s.forget[:4], self.flat)
        for i in range(0, len(s.forget), size):
            rows, last = s.forget[i : i + size], i // size
            loop = self.timed("loop", lambda r=rows: s.authors.scores(r, self.flat))
            kept["authors"].append(loop)
            for name in ("CG", "EK-FAC", "H = I"):
                if name != "CG" and last % 4:  # scores alone, timed on the CG direction
                    kept[name].append(self.scan(rows, self.found[name].x))
                    continue
                kept[name].append(
                    self.timed(f"scan {name}", lambda r=rows, n=name: self.scan(r, self.found[n].x))
                )
        self.scores = {name: torch.cat(parts).cpu() for name, parts in kept.items()}

    def scan(self, rows, v, tokens=None):
        tokens = tokens or self.a.batch_tokens
        return scan(
            self.s.model, rows, v, LOSSES["ga"], batch_tokens=tokens, progress=False
        ).gain  # fmt: skip

    def index(self):
        """Sketches of every gradient once; then a direction costs its own sketch and a product."""
        s = self.s
        held = s.held()
        ref = torch.cat([held.chosen, held.rejected])
        with tempfile.TemporaryDirectory() as folder:
            index = self.timed(
                "index", lambda: scan(
                    s.model, s.forget, loss=LOSSES["ga"], mode="index", spec=Sketch(4096),
                    out=Path(folder) / "index", progress=False, batch_tokens=self.a.batch_tokens,
                ),
            )  # fmt: skip

            for metric in ("dot", "preconditioned"):

                def asked(metric=metric):
                    q = query(s.model, held.pairs, dpo_objective, index.spec, ref=ref)
                    return -index.scores(q, metric).flatten().cpu()

                self.scores[f"index, {metric}"] = self.timed(f"index, {metric}", asked)

    def sweep(self, rounds=3):
        """Scores of the middle chunk by the size of a batch, interleaved."""
        size = -(-len(self.s.forget) // self.a.chunks)
        rows, v = self.s.forget[len(self.s.forget) // 2 :][:size], self.found["CG"].x
        for _ in range(rounds):
            for tokens in (512, 1024, 2048, 4096, 8192):
                self.timed(f"{tokens} tokens", lambda t=tokens: self.scan(rows, v, t))
        found = {t: self.of(f"{t} tokens") for t in (512, 1024, 2048, 4096, 8192)}
        best = min(found.values())
        words = ", ".join(f"{t}: {x / best:.2f}" for t, x in found.items())
        print(f"scan by tokens of a batch, relative time: {words}")

    def peaks(self):
        s, few = self.s, self.s.forget[-min(64, len(self.s.forget)) :]
        v = self.found["CG"].x
        operator = s.outer.operator(torch.zeros(len(s.forget)))
        ((_, real),) = operator.terms
        peer = DoubleBackward(s.model, real.batches)
        return {
            "authors, direction": peak_mb(lambda: s.authors.direction(s.pairs)),
            "authors, loop": peak_mb(lambda: s.authors.scores(few, self.flat)),
            "double backward, product": peak_mb(lambda: peer.matvec(v)),
            "ours, direction": peak_mb(lambda: s.outer.gradient()),
            "ours, product": peak_mb(lambda: operator.matvec(v)),
            "ours, scores": peak_mb(lambda: self.scan(few, v)),
        }


def agreement(step):
    """Of H = I with the authors' scores, exactly; of every other with ours by CG, in rank."""
    s, batches = step.scores, -(-step.a.pairs // step.s.authors.batch)
    identity = s["H = I"].double() * float(step.found["H = I"].damping) * batches
    theirs = s["authors"].double()
    off = float((identity - theirs).abs().max() / theirs.abs().max())
    print(f"H = I scores are the authors' to {off:.1e} of the largest (times batches, gamma)")
    for name in s:
        with_cg, with_theirs = (spearman(s[name], s[other]).rho for other in ("CG", "authors"))
        print(f"Spearman of {name:22} with CG {with_cg:.4f}, with the authors' {with_theirs:.4f}")


def report(step):
    chunks = step.a.chunks
    loop, ours = chunks * step.of("loop"), chunks * step.of("scan CG")
    grad = step.of("reference") + step.of("direction")
    theirs = step.of("authors direction") + loop
    lines = {
        "authors (H = I)": (step.of("authors direction"), 0.0, loop),
        "loop + double backward CG": (
            step.of("authors direction"), step.of("solve double backward"), loop,
        ),
        **{f"ours, {n}": (grad, step.of(f"solve {n}"), ours) for n in SOLVERS},
        "ours, index, next J": (0.0, 0.0, step.of("index, dot")),
        "ours, index, next J, damped": (0.0, 0.0, step.of("index, preconditioned")),
    }  # fmt: skip
    print(f"{'':32}{'direction':>10}{'solve':>10}{'scores':>10}{'all':>10}{'authors/':>10}")
    for name, parts in lines.items():
        print(
            f"{name:32}" + "".join(f"{x:10.2f}" for x in (*parts, sum(parts)))
            + f"{theirs / sum(parts):10.2f}"
        )  # fmt: skip
    print(f"index: {step.of('index'):.2f} s once; reference log-probabilities (in every")
    print(f"direction above, needed once a run): {step.of('reference'):.2f} s")
    whole = sum(lines["ours, CG"])
    print(
        f"loop + double backward / ours, CG: {sum(lines['loop + double backward CG']) / whole:.2f}"
    )


def main():
    a = arguments()
    torch.set_num_threads(a.threads)
    setting = Setting(a)
    count, every = numel(trainable(setting.model)), setting.model.num_parameters()
    tokens = sum(map(len, setting.forget)) / len(setting.forget)
    print(
        f"{a.family}, {a.layers} layers of {a.hidden}, vocabulary {a.vocab}: {count} trainable of "
        f"{every}; {a.candidates} candidates of {tokens:.0f} tokens on average, {a.pairs} pairs, "
        f"{a.retain} retain rows; {a.threads} thread(s), {DEVICE}"
    )
    step = Step(setting)
    step.directions()
    step.solves()
    cg = step.found["CG"]
    print(f"CG: {cg.iterations} iterations, residual {cg.residual:.1e}, damping {cg.damping:.2e}")
    print(f"CG, EK-FAC: {step.found['CG, EK-FAC'].iterations} iterations")
    step.candidates()
    step.index()
    step.sweep()
    report(step)
    agreement(step)
    print("peak MB: " + "; ".join(f"{n} {mb:.0f}" for n, mb in step.peaks().items()))


if __name__ == "__main__":
    main()
