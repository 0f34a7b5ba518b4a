# `make demo` and `make test` need only Python 3.11+ and make; both set up .venv once.
#   make test TORCH='torch==2.13.0'    another torch requirement than the range in pyproject.toml
PYTHON ?= python3
TORCH ?=
ARGS ?=
BIN := .venv/bin
STAMP := .venv/.installed-$(subst /,_,$(subst $() ,_,$(TORCH)))

.PHONY: demo test check docs dist setup clean

demo: setup
	$(BIN)/fewbits compare --data digits --bits 1,2 --seed 0-2 --methods kmeans,kmeans-finetuned,penalty,penalty-snapped --out runs/demo --overwrite $(ARGS)

test: setup
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/basedpyright --verifytypes fewbits --ignoreexternal

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

dist: setup
	PYTHON=$(BIN)/python TORCH='$(TORCH)' .ci/dist

setup: $(STAMP)

# One pip call for torch and fewbits, so that torch is resolved once, within both requirements.
$(STAMP): pyproject.toml setup.py $(wildcard src/fewbits/*/*.[ch])
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fewbits needs Python 3.11 or newer; try: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH),'$(TORCH)') -e '.[dev]'
	rm -f .venv/.installed-*
	touch '$@'

clean:
	rm -rf .venv build dist site .pytest_cache .ruff_cache .hypothesis
