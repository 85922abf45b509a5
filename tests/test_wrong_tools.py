"""The repros of second-order tools: what this project gives in them is the float64 truth."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "wrong_tools")]

import of_ours  # noqa: E402
import of_torch  # noqa: E402
from repro import collected, draws, judge, twice  # noqa: E402


@pytest.mark.parametrize("repro", of_ours.FOUND, ids=lambda r: f"{r.tool}: {r.quantity}")
def test_ours_is_right_or_raises(repro):
    found = judge(repro)
    if "plain op" in repro.tool:
        assert found.verdict == "raises" and "dual_" in found.said
    else:
        assert found.verdict == "right", found
        assert found.error < 1e-10


def test_a_wrong_number_is_told():
    """A dropped second-order term, and an entry that is off in one tensor of two."""
    raw = next(r for r in of_torch.FOUND if r.run is of_torch.raw_function)
    assert judge(raw).verdict == "wrong"
    (x, y), (v, w) = draws((4, 4), (4, 4))
    want = twice(lambda x, y: (x**2 * y).sum(), [x, y], [v, w])
    off = [want[0], want[1].clone()]
    off[1][2, 3] += 1.0
    found = []
    collected(found, "tool", "quantity")(lambda: (off, want))
    assert judge(found[0]).verdict == "wrong"
    assert judge(found[0]).got == pytest.approx(judge(found[0]).want + 1)
