# The two commands of the README are `make demo` and `make test`; each sets up what it needs first.

PYTHON ?= python3
DEMO ?= gcvit
VENV := .venv/bin
UPSTREAM := .venv-upstream
# A copy of the tests away from the sources, so that they import what is installed.
AWAY := build/upstream
# What is packed, and a stamp that changes its name where a file comes or goes.
PACKED := pyproject.toml MANIFEST.in Makefile README.md LICENSE $(wildcard *.py *.yml) \
    $(shell find benchmarks configs docs mmattn tests tools -type f ! -name '*.pyc' ! -name '*.so' | sort)
BUILT := dist/built-$(firstword $(shell echo $(PACKED) | cksum))

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-upstream wheel docs lint format clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo '  PYTHON=python3.12        the Python to set up with (>= 3.10)'
	@echo '  DEMO=gcvit               which demo to run: gcvit, dat or quadtree'
	@echo '  MMATTN_TORCH_INDEX=URL   where to take torch from, if not from the ordinary package index'
	@echo '  PIP_FIND_LINKS=FOLDER    wheels that pip takes before it compiles or downloads'

setup: ## Make .venv with everything in it (a second run installs nothing)
	@$(PYTHON) tools/setup_env.py

demo: setup ## Train a small detector on generated images, evaluate it and draw what it finds
	$(VENV)/python tools/demo.py $(DEMO)

test: setup ## Run all tests
	$(VENV)/python -m pytest

wheel: $(BUILT) ## Build the sdist, and from it the wheel, in dist/ (nothing where they are up to date)
	@ls dist/mmattn-*

$(BUILT): $(PACKED) | setup
	rm -rf dist
	$(VENV)/python -m build --no-isolation
	$(VENV)/python -m pytest tests/test_distributions.py --dist=dist
	touch $@

# Left out are the tests of the set-up and of packing, which need the sources, and those of single kernels.
test-upstream: wheel ## Test the wheel beside OpenMMLab's own releases, in an environment of its own
	@$(PYTHON) tools/setup_env.py --venv $(UPSTREAM) --stack openmmlab --wheel dist/mmattn-*.whl
	rm -rf $(AWAY) && mkdir -p $(AWAY)
	tar -xf dist/mmattn-*.tar.gz -C $(AWAY) --strip-components=1
	cd $(AWAY) && rm -rf mmattn configs tools model-index.yml
	ln -s $(CURDIR)/$(UPSTREAM)/lib/python3*/site-packages/mmattn/.mim/* $(AWAY)
	cd $(AWAY) && $(CURDIR)/$(UPSTREAM)/bin/python -m pytest tests --installed=$$(echo $(CURDIR)/dist/*.whl) \
	    --ignore=tests/test_setup_env.py --ignore=tests/test_distributions.py --ignore=tests/ops \
	    --ignore=tests/docs --ignore=tests/benchmarks

docs: setup ## Write the pages that are made from other files, and build the site into site/
	$(VENV)/python docs/generate/model_zoo.py
	$(VENV)/python docs/generate/troubleshooting.py
	$(VENV)/python -m mkdocs build
	@echo 'open site/index.html'

lint: setup ## Check style, change nothing
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .

format: setup ## Mend style
	$(VENV)/ruff check --fix .
	$(VENV)/ruff format .

clean: ## Remove the environment and what was built; work_dirs stays
	rm -rf .venv .venv-upstream build dist site *.egg-info mmattn/.mim .pytest_cache .ruff_cache
