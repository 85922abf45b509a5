"""`u2a validate`: are predicted gains true, and do they select better than anything else?

python benchmarks/validate.py [OUT] [small|medium|large] [SEEDS]
"""

from __future__ import annotations

import sys
from pathlib import Path

from u2a.benchmark import validate

if __name__ == "__main__":
    given = sys.argv[1:]
    out, size, seeds = given + ["runs/validate", "small", "3"][len(given) :]
    validate(Path(out), size=size, seeds=int(seeds))
