"""The validation benchmark: are predicted gains true, and do they choose better than anything else?

A language model is trained on planted data of a chosen size and share of mislabelled negatives;
then candidates are really unlearnt, one by one, in groups, and as every selector would have it.
"""

from u2a.benchmark.run import validate

__all__ = ["validate"]
