# Two commands matter: `make demo` and `make test`. Both set up .venv first; nothing else needs to be installed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-all setup bench lab readme docs quarto lint wheel clean help
help:            ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

# torch first and by exact version, so that pip never looks for another build of it
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(not (3,11) <= sys.version_info[:2] <= (3,13))" || { echo "error: $$($(PYTHON) --version) cannot be used; expected Python 3.11 to 3.13; run: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Setting up $(VENV): JupyterLab, torch, transformers and what they need, about 2 GB (once, 2 to 5 minutes)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $(READY)

setup: $(READY) ## set up .venv only

# options of the demonstration, as in: make demo DEMO=--small
DEMO ?=
demo: $(READY)   ## the whole job on phantoms, from data to outputs/demo/report.html
	@$(BIN)/fada demo $(DEMO)

# as many workers as cores, at most four, since each holds models of its own; a file of tests stays on one, where its
# fixtures are made once. WORKERS=0: one process
WORKERS ?= auto
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile
test: $(READY)   ## the tests, under 12 minutes on 2 cores
	@$(PYTEST) -m "not slow and not browser and not fault"

test-all: $(READY) ## the tests, the slow, browser and fault ones too
	@$(PYTEST)

bench: $(READY)  ## measured comparisons; each prints a ratio from one run
	@for b in bench/*.py; do echo "== $$b"; $(BIN)/python $$b --quick || exit 1; done

lab: $(READY)    ## JupyterLab, beginning with the app notebooks
	@$(BIN)/jupyter lab --notebook-dir=. --LabApp.default_url=/lab/tree/nbs/app/ask.ipynb

docs: $(READY)   ## the notebooks as a book that opens offline: _docs/index.html
	@$(BIN)/python -m fada.book _docs

quarto: $(READY) ## the same by nbdev, where quarto is installed
	@command -v quarto >/dev/null || { echo "error: quarto is not installed; expected its command on PATH; get it from quarto.org, or run: make docs"; exit 1; }
	@$(BIN)/nbdev-docs

lint: $(READY)   ## ruff and mypy, over what they are set to in pyproject.toml
	@$(BIN)/ruff check && $(BIN)/ruff format --check --quiet && $(BIN)/mypy

wheel: $(READY)  ## dist/: a wheel and a source archive
	@$(BIN)/python -m build --no-isolation --outdir dist

readme: $(READY) ## README.md from nbs/index.ipynb
	@$(BIN)/jupyter nbconvert --config jupyter_nbconvert_config.py --to markdown --stdout nbs/index.ipynb > README.md

clean:           ## delete .venv; data and outputs stay
	rm -rf $(VENV)
