"""Metrics of unlearning and of preference alignment, and `u2a eval`.

`answers`: probability, ROUGE-L. `memorisation`: exact memorisation, extraction strength. `tofu`:
truth ratio, forget quality, model utility. `mia`: membership inference. `alignment`: rewards, win
rate, refusals, diversity. `forgotten`: the early-exit rule. `suites`, `results`, `openunlearning`:
what `u2a eval` measures and writes. `comparison`: metrics.json of a run. Formulas and sources:
docs/metrics.md.
"""
