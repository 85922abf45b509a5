"""The pictures of a run's report leave nothing out."""

from __future__ import annotations

from u2a import plots


def test_every_method_has_a_bar_of_its_own_colour(monkeypatch):
    monkeypatch.setattr(plots, "_png", lambda figure: figure)
    shares = {f"method {i}": {"harmful": 1.0} for i in range(14)}
    figure = plots.class_weights(shares)
    bars = figure.axes[0].containers
    assert [b.get_label() for b in bars] == list(shares)
    assert len({b.patches[0].get_facecolor() for b in bars}) == len(shares)
    plots.plt.close(figure)
