# Two commands do all set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
# As pip's index has it: on Linux mostly a CUDA build (point pip at an index of CPU builds for a
# small one). `TORCH=torch make demo` takes the newest.
TORCH ?= torch>=2.11,<2.14
BIN := $(VENV)/bin
OLD := import sys; sys.exit(sys.version_info < (3, 10))
# Before make 4, as on macOS, the lines of two jobs may mix.
SYNC := $(if $(filter output-sync,$(.FEATURES)),--output-sync=line)

.PHONY: demo test suite aot interpreted emulated check bench evidence evidence-small gpu wheel rivals clean
.DEFAULT_GOAL := test

$(VENV)/ready: pyproject.toml setup.py $(shell find csrc -type f)
	@$(BIN)/python -c '$(OLD)' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -c '$(OLD)' || (echo "$(PYTHON) is too old: SRA needs Python 3.10. PYTHON=python3.12 make ..." >&2; exit 1)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(VENV)/ready ## distil a real teacher into a real student, with a table, curves and a checkpoint
	$(BIN)/sra demo

test: check ## lint, types and every test; then the GPU kernels without a GPU, on the ops' own tests
	$(MAKE) --jobs=2 $(SYNC) suite interpreted emulated

suite: $(VENV)/ready ## every test on the backends of a CPU; GPU kernels are compiled for two targets
	OMP_WAIT_POLICY=passive SRA_TEST_TARGETS="sm_90 gfx942" $(BIN)/python -m pytest

aot: $(VENV)/ready ## every GPU kernel compiled for every target, and held to its budget
	$(BIN)/python -m pytest tests/test_aot.py

OPS := $(addprefix tests/,span_com span_kl linear_span_kl attention_mass span_geometry)

interpreted: $(VENV)/ready ## the Triton kernels, in Triton's interpreter: two cases of each test
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 SRA_TEST_BACKENDS=interpreter SRA_TEST_CASES=2 $(BIN)/python -m pytest -q $(OPS)

emulated: $(VENV)/ready ## the CUDA kernels, on the CPU
	library=$$($(BIN)/python -m tests.emulation.build) && SRA_KERNELS_CUDA_LIBRARY=$$library OMP_NUM_THREADS=1 SRA_TEST_BACKENDS=cuda $(BIN)/python -m pytest -q $(OPS)

check: $(VENV)/ready ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/ready ## every op beside its rivals, into benchmarks/results/ and README.md (about 10 min)
	$(BIN)/sra bench

evidence: $(VENV)/ready ## every method on every pair, into docs/evidence.md (about a day; `MINUTES=110` for a part)
	$(BIN)/python -m benchmarks.quality --ablations --minutes $(or $(MINUTES),inf)

evidence-small: $(VENV)/ready ## one pair, the main methods, one seed (under 20 min)
	$(BIN)/python -m benchmarks.quality --small

gpu: $(VENV)/ready ## on a machine with a GPU: its tests, sanitizer, benchmarks (under 9 min; run again to go on)
	$(BIN)/python -m benchmarks.gpu

wheel: $(VENV)/ready ## dist/*.whl, one for every torch and Python on this platform
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

rivals: $(VENV)/ready ## other libraries for `make bench`, which goes without those that are missing
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'

clean:
	rm -rf $(VENV) build dist *.egg-info sra_kernels/*.so
