# make train: from nothing to a trained model.   make test: the whole check.   Both set up .venv first, once.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: train test export lab docs clean
train: $(READY)
	@$(BIN)/llmlab_train --config quickstart

test: $(READY)
	@$(BIN)/python tests/check.py

# after editing notebooks: write the modules, clean the notebooks, write the README
export: $(READY)
	@$(BIN)/python tests/check.py --write

# the book as a website, in _docs
docs: $(READY)
	@$(BIN)/python nbs/_site/build.py

lab: $(READY)
	@$(BIN)/jupyter lab nbs

$(READY): settings.ini setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llmlab needs Python 3.11 or newer; this is %s. Try: make PYTHON=python3.12" % sys.version.split()[0])'
	@echo "Setting up $(VENV): a few minutes, only this once."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

clean:
	rm -rf $(VENV) _docs _proc
