# make install | test | lint | types | docs | check | demo | clean         (see CONTRIBUTING.md)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# a checkout of solo-learn main to test against instead of the PyPI release
HOST ?=
# demo: methods besides DINO and DINO-vMF, e.g. METHODS="ibot_vmf msn"
METHODS ?=
OUT ?= demo

# The pair that is tested; the CPU-only wheels of other versions may lack a matching torchvision.
TORCH := torch==2.14.1 torchvision==0.29.1
# Pinned by hand: their own pins (torch 1.9, pytorch-lightning) cannot be installed beside today's packages.
NO_DEPS := solo-learn==1.0.2 lightly==1.6.0 lightly-utils==0.0.2 mvtb-data==1.6.1 elpv-dataset==1.0.0.post1 \
	animal-mnist==0.4

comma := ,
space := $(subst ,, )
BOTH := dino_multicrop dino_vmf
CHOSEN := $(if $(METHODS),$(BOTH) $(filter-out $(BOTH),$(METHODS)))

# Numeric libraries of several test processes on few cores slow each other down.
TEST_ENV := OMP_NUM_THREADS=1 PYTHONPATH=$(HOST)

.PHONY: install test test-slow lint types docs check demo clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -e ".[dali,analysis,test,dev,docs]"
	$(BIN)/pip install --quiet --no-deps $(NO_DEPS)
	touch $@

test: install
	$(TEST_ENV) $(BIN)/python -m pytest -n 2

test-slow: install
	$(TEST_ENV) $(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

# site/index.html; a warning is an error
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

check: lint types docs test

demo: install
	$(BIN)/python scripts/demo.py output_dir=$(OUT) $(if $(CHOSEN),"methods=[$(subst $(space),$(comma),$(strip $(CHOSEN)))]")

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
