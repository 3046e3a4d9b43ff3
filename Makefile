# Two commands do all set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
# A torch of CPU size is installed first; `TORCH=torch make demo` takes the newest, CUDA included.
TORCH ?= torch>=2.11,<2.14
BIN := $(VENV)/bin

.PHONY: demo test check bench rivals clean
.DEFAULT_GOAL := test

$(VENV)/ready: pyproject.toml setup.py $(shell find csrc -name '*.cpp' -o -name '*.h')
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(VENV)/ready ## distil a real teacher into a real student, with a table, curves and a checkpoint
	$(BIN)/sra demo

test: check ## lint, types and every test
	$(BIN)/python -m pytest

check: $(VENV)/ready ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/ready ## every op beside its rivals, into benchmarks/results/ and README.md (about 10 min)
	$(BIN)/sra bench

rivals: $(VENV)/ready ## other libraries for `make bench`, which goes without those that are missing
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'

clean:
	rm -rf $(VENV) build *.egg-info sra_kernels/*.so
