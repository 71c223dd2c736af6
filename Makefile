# make demo: install, generate with the embedded model, compare drafters.    make test: install, lint, types, arrows, tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test install clean

demo: install
	$(BIN)/redraft generate --max-tokens 160 --seed 1 < /dev/null
	$(BIN)/redraft compare --draft copyspec --draft token-recycling --limit 6 --max-tokens 64 --rounds 3 --temperature 0

test: install
	scripts/check

install: $(VENV)/installed

# one stamp: a second run installs nothing until the requirements change
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Redraft needs Python 3.11 or newer; found " + sys.version.split()[0] + " (make PYTHON=python3.11)")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
