"""MUSE on one model: verbatim and knowledge memorisation. Source: arXiv 2407.06460.

PrivLeak, its third number, is in `u2a.metrics.mia`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from u2a.batch import Row
from u2a.metrics.suites.subject import Entries, Subject
from u2a.metrics.suites.tofu import rouge_entry

STOPS = ("\n\n", "\nQuestion", "Question:")
TOKENS = {"verbmem": 128, "knowmem": 32}


def muse_suite(subject: Subject, sets: Mapping[str, Sequence[Row]]) -> Entries:
    """ROUGE-L f1 of greedy continuations (VerbMem, 128 tokens) and answers (KnowMem, 32 tokens, cut
    where the next question begins). `sets`: forget_verbmem, forget_knowmem, retain_knowmem; low is
    forgotten, on retain high is kept. Few-shot examples are part of the prompts given."""
    out: Entries = {}
    for name, rows in sets.items():
        kind = name.rpartition("_")[2]
        stop = STOPS if kind == "knowmem" else ()
        out |= rouge_entry(subject, f"{name}_ROUGE", rows, TOKENS[kind], "rougeL_f1", stop)
    return out
