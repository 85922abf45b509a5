# The commands of README.md. Each makes .venv if there is none and builds the extension when needed.
# VENV=path uses an existing environment with its own torch: only the package itself is installed.

PYTHON ?= python3
ifdef VENV
  EXISTING := yes
else
  VENV := .venv
endif
RUN := $(VENV)/bin/python
STEP := @$(PYTHON) .ci/step
MACHINE ?= $(shell uname -m)
START := $(shell date +%s)
TOOK = $$(( $$(date +%s) - $(START) )) s
BUILT := $(VENV)/.u2a-kernels
CSRC := $(wildcard csrc/*.h csrc/*.cuh csrc/*.cpp csrc/*.cu)

export PYTHON
export OMP_WAIT_POLICY ?= passive
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test lint pytest aot bench bench-peers clean packages FORCE
.NOTPARALLEL:

help:
	@echo "make demo    train a tiny model on planted data, unlearn it, write a report (4 minutes)"
	@echo "make test    lint, types, tests, ahead-of-time GPU compiles (6 minutes)"
	@echo "make lint    ruff, clang-format and mypy only"
	@echo "make bench   time and memory against plain torch"
	@echo "make bench-peers  the index scan against other packages, in an environment of their own"
	@echo "make clean   remove .venv and everything built"
	@echo "VENV=path uses an existing environment; PYTHON=python3.12 chooses the one that makes .venv"

demo: $(BUILT)
	@$(RUN) -m u2a demo --out $(or $(OUT),runs/demo)
	@echo "make demo: $(TOOK)"

test: lint pytest aot
	@echo "make test: everything passed in $(TOOK). Logs in build/logs; next: make demo"

lint: $(BUILT)
	$(STEP) "ruff check" $(RUN) -m ruff check -q .
	$(STEP) "ruff format" $(RUN) -m ruff format -q --diff .
	$(STEP) "clang-format" $(VENV)/bin/clang-format --dry-run -Werror $(CSRC)
	$(STEP) "mypy" $(RUN) -m mypy

pytest: export OMP_NUM_THREADS ?= 1
pytest: $(BUILT)
	$(STEP) --last "pytest" $(RUN) -m pytest -n 2 -rs tests

aot: $(BUILT)
	$(STEP) --show "kernels for GPUs" $(RUN) tests/aot.py

bench: $(BUILT)
	@mkdir -p benchmarks/results
	@$(RUN) -m pytest benchmarks --benchmark-timer=torch.utils.benchmark.timer \
	  --benchmark-columns=median,iqr,rounds --benchmark-group-by=func \
	  --benchmark-json=benchmarks/results/$(MACHINE).json
	@echo "make bench: $(TOOK). Written to benchmarks/results/$(MACHINE).json"

PEERS := build/peers-venv
bench-peers:
	$(STEP) "peers' environment" .ci/install $(PEERS)
	@$(MAKE) --no-print-directory VENV=$(PEERS) $(PEERS)/.u2a-kernels
	$(STEP) --show "peers" $(PEERS)/bin/python benchmarks/peers/install.py $(PEERS)/bin/python
	@$(PEERS)/bin/python benchmarks/peers/run.py $(GROUPS)
	@echo "make bench-peers: $(TOOK)"

clean:
	rm -rf .venv build *.egg-info u2a_kernels/*.so .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BUILT): setup.py pyproject.toml $(CSRC) | packages
	$(STEP) "build" $(RUN) -m pip install -v --no-build-isolation --no-deps -e .
	@grep -m1 -o 'u2a-kernels: U2A_BUILD.*' build/logs/build.log
	@echo "$(CURDIR)" > $@

# The stamp names the checkout it was built from, so that two of them can share an environment.
ifneq ($(shell cat $(BUILT) 2>/dev/null),$(CURDIR))
$(BUILT): FORCE
endif

ifdef EXISTING
NEEDS_demo := train report
NEEDS_bench := bench
packages:
	@$(RUN) .ci/missing $(foreach goal,$(MAKECMDGOALS),$(or $(NEEDS_$(goal)),test lint))
else
packages: .venv/.packages
.venv/.packages: requirements/pinned.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(STEP) ".venv, pinned packages" .ci/install .venv
	@touch $@
endif
