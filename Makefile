# From a clone to a trained model:  make train
# Every target prepares .venv first, which takes minutes once and no time after that.

# The user's own value wins. More threads than cores are slower by far, and the ranks share the cores.
OMP_NUM_THREADS ?= 1
export OMP_NUM_THREADS
# Passed on as it is: make train ARGS="--train-iters 200", make test ARGS="-k alignment -x"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup train test test-all test-fast matrix cards chaos check lock versions

help:
	@echo 'make setup   prepare .venv (PYTHON=/path/to/python3.12 to choose the interpreter; LATEST=1 for the'
	@echo '             newest versions allowed, LATEST=0 for the tested ones of requirements.lock again)'
	@echo 'make train   train the default recipe: all GPUs, or two processes on CPU (NPROC=n, ARGS="...")'
	@echo 'make test    run the test suite on up to four cores (ARGS="...")'
	@echo 'make test-all   with the wide tier, of which make test runs each kind: what CI runs'
	@echo 'make test-fast  its quick part, for the loop of a developer'
	@echo 'make matrix  hold 423 parallel layouts against one process (ARGS="tp2 cp2", "--list", "--help")'
	@echo 'make cards   prove model families and write docs/models (ARGS="llava", ARGS="llava --number 2", "--help")'
	@echo 'make chaos   try to break the promises of docs/reliability.md for ten minutes (ARGS="--minutes 60 --seed 1")'
	@echo 'make check   format, lint, types and structure: what CI checks besides the tests'
	@echo 'make lock      write requirements.lock anew, from the ranges of pyproject.toml'
	@echo 'make versions  run the core of the suite on the oldest and the newest versions allowed (ARGS="--help")'

setup:
	@scripts/setup

train: setup
	@scripts/train $(ARGS)

# A file's tests share what they prepare, so a file is one process's. Slow files come first, then those with
# ranks, and the short ones last, so that the processes end together. One that is lost (killed, or 600 s in one test) is not
# replaced: pytest-xdist would wait for it for ever; the run ends, and names the test.
PROCESSES = -n auto --dist loadfile --no-loadscope-reorder --max-worker-restart 0

# With this variable each of some hundred processes would compile the sources anew.
PYTEST = env -u PYTHONDONTWRITEBYTECODE .venv/bin/python -m pytest

test: setup
	$(PYTEST) $(PROCESSES) $(ARGS)

test-all: setup
	$(PYTEST) $(PROCESSES) --wide $(ARGS)

test-fast: setup
	$(PYTEST) -n auto --dist worksteal --max-worker-restart 0 -m "not slow" tests/structure tests/unit $(ARGS)

matrix: setup
	.venv/bin/python -m tests.matrix $(ARGS)

cards: setup
	.venv/bin/python -m tests.cards $(ARGS)

chaos: setup
	.venv/bin/python -m tests.chaos $(ARGS)

check: setup
	@scripts/check

# These two make environments of their own, in .versions/.
lock:
	@"$$(scripts/find_python)" -m scripts.lock $(ARGS)

versions:
	@"$$(scripts/find_python)" -m scripts.versions $(ARGS)
