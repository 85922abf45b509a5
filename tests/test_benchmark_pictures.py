"""The pictures of the validation report can be read: no two lines look alike."""

from __future__ import annotations

from u2a.benchmark.predicted import SOLVERS
from u2a.benchmark.selectors import SELECTORS
from u2a.benchmark.tables import alignment_picture, predicted_picture
from u2a.plots import AGAIN, looks

ESTIMATORS = [*SOLVERS, "second order", "sketch index", *(f"{n}{AGAIN}" for n in SOLVERS)]


def test_no_two_lines_look_alike():
    for names in (ESTIMATORS, list(SELECTORS), [str(i) for i in range(50)]):
        found = looks(names)
        assert list(found) == names
        assert len({tuple(sorted(look.items())) for look in found.values()}) == len(names)
    again = looks(["ggn", f"ggn{AGAIN}"])
    assert again["ggn"]["color"] == again[f"ggn{AGAIN}"]["color"]


def test_pictures_of_every_estimator_and_selector():
    rows = [
        {"seed": 0, "loss": "npo", "design": "single", "weight": w, "estimator": n, "rho": i / 20}
        for i, n in enumerate(ESTIMATORS)
        for w in (0.01, 0.1)
    ]
    assert predicted_picture(rows).startswith(b"\x89PNG")
    rows = [
        {"seed": 0, "loss": "npo", "noise": 0.0, "selector": n, "total": t, "gain": i / 20}
        for i, n in enumerate(SELECTORS)
        for t in (0.1, 0.4)
    ]
    assert alignment_picture(rows).startswith(b"\x89PNG")
