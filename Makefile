# Needs python3 (3.10 or later) and make; everything else goes into .venv.
PYTHON ?= python3
PY := .venv/bin/python
NB ?= .

export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
export PIP_NO_INPUT := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Importing fastai makes torch warn, with a path of this machine, which would end up in the outputs of notebooks.
export PYTHONWARNINGS ?= ignore::FutureWarning:torch.jit._script
# One thread: for small tensors a pool costs more than it gives, and outputs do not depend on the number of cores.
test execute: export OMP_NUM_THREADS ?= 1
test execute: export MKL_NUM_THREADS ?= 1
test execute: export OPENBLAS_NUM_THREADS ?= 1

.PHONY: help demo test docs bench bench-coverage readme execute export clean

help:
	@echo 'make demo [DATA=folder]          prune a small model and show what came of it'
	@echo 'make test                        everything: sync checks, documentation, notebooks, pytest'
	@echo 'make docs                        the documentation site, in _docs/html'
	@echo 'make bench                       side-by-side benchmarks'
	@echo 'make bench-coverage [ARGS=--quick]  how many models are pruned, beside Torch-Pruning: hours'
	@echo 'make execute [NB=x.ipynb FLAGS=slow]  run the notebooks, keep their outputs, refresh README.md'
	@echo 'make export | readme | clean     modules from notebooks | README.md from index.ipynb | remove build output'

demo: .venv/.stamp-core
	$(PY) tools/demo.py $(if $(DATA),--data "$(DATA)")

test: .venv/.stamp-dev  # pytest builds the site that it looks at
	rm -rf _docs
	$(PY) -m pytest -q -n 2 --dist loadfile

docs: .venv/.stamp-dev
	$(PY) -m tools.docs_site

bench: .venv/.stamp-bench
	$(PY) benchmarks/run.py

bench-coverage: .venv/.stamp-bench
	$(PY) benchmarks/coverage.py --libs ours,torch-pruning $(ARGS)

readme: .venv/.stamp-dev
	$(PY) -m tools.readme

export: .venv/.stamp-dev
	$(PY) .venv/bin/nbdev-export
	$(PY) -m fasterai_lib.cli schema -o fasterai_lib/recipe.schema.json
	$(PY) .venv/bin/nbdev-clean
	$(PY) .venv/bin/nbdev-clean --fname index.ipynb

execute: export
	$(PY) .venv/bin/nbdev-test "$(NB)" --save --n-workers 1 $(if $(FLAGS),--flags "$(FLAGS)")
	$(PY) .venv/bin/nbdev-clean
	$(PY) .venv/bin/nbdev-clean --fname index.ipynb
	$(PY) -m tools.readme

clean:
	rm -rf _docs build dist demo_output .pytest_cache .hypothesis jupyter_execute
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.stamp-core: settings.ini setup.py pyproject.toml | .venv/bin/python
	$(PY) -m pip install --quiet -e .
	touch $@

.venv/.stamp-dev: .venv/.stamp-core
	$(PY) -m pip install --quiet -e '.[dev]'
	touch $@

.venv/.stamp-bench: .venv/.stamp-core
	$(PY) -m pip install --quiet -e '.[bench]'
	touch $@
