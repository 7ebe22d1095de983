# The two commands of the README are `make demo` and `make test`; each sets up what it needs first.

PYTHON ?= python3
DEMO ?= gcvit
# The environment; its set of packages, requirements/STACK.txt; a wheel, not the working tree.
VENV := .venv
STACK := onedl
WHEEL :=
UPSTREAM := .venv-upstream

RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --progress-bar off
DONE := $(VENV)/setup
COMMON := requirements/common.txt
SET := requirements/$(STACK).txt
MMCV := $(if $(filter onedl,$(STACK)),onedl-)mmcv
EXTRAS := [$(STACK),dev,viz,export]
STEP := PYTHON='$(PYTHON)' sh requirements/step.sh
CORES := $(shell nproc)
# One process a core, and tests of one file in one process, as they share fixtures.
PYTEST := -m pytest -n $(CORES) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-upstream wheel docs lint format clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo '  PYTHON=python3.12        the Python to set up with (>= 3.10)'
	@echo '  DEMO=gcvit               which demo to run: gcvit, dat or quadtree'
	@echo '  MMATTN_TORCH_INDEX=URL   where to take torch from, if not from the ordinary package index'
	@echo '  PIP_FIND_LINKS=FOLDER    wheels that pip takes before it compiles or downloads'

# ---- Set-up: a stamp for each step, in $(VENV)/setup

setup: $(DONE)/checked $(DONE)/operators ## Make .venv (a second run installs nothing)
	@echo 'set-up: $(VENV) is complete'

$(DONE)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	    "mmattn needs Python >= 3.10, and %s is %s" % (sys.executable, sys.version.split()[0]))'
	@$(STEP) $@ 'virtual environment $(VENV)' '[ -x $(RUN) ] || rm -rf $(VENV)/bin; \
	    $(PYTHON) -m venv $(VENV); $(PIP) -c $(COMMON) --upgrade pip setuptools wheel ninja'

$(DONE)/torch: $(DONE)/venv $(COMMON)
	@$(STEP) $@ 'torch (downloads 0.2 GB as a CPU build, several GB for CUDA: MMATTN_TORCH_INDEX)' \
	    '$(PIP) $(if $(MMATTN_TORCH_INDEX),--index-url $(MMATTN_TORCH_INDEX)) -c $(COMMON) \
	    torch torchvision; $(RUN) requirements/mend_torchvision.py'

# Compiled against the installed torch, hence without isolation, and in half the time at -O1. The
# path is for ninja, without which one file is compiled at a time.
BUILD_MMCV = PATH=$(abspath $(VENV))/bin:$$PATH MAX_JOBS=$${MAX_JOBS:-$(CORES)} MMCV_WITH_OPS=1 \
    CFLAGS="-g0 -O1 $$CFLAGS" $(PIP) --no-build-isolation --no-deps -c $(SET) $(MMCV)

$(DONE)/mmcv: $(DONE)/torch $(SET)
	@$(STEP) $@ 'mmcv (compiled in about 10 minutes on 2 cores where pip finds no wheel)' \
	    '$(BUILD_MMCV)'

# opencv-python needs the libraries of a desktop; the headless build has the same functions.
$(DONE)/packages: $(DONE)/mmcv $(SET)
	@$(STEP) $@ 'mmengine, mmdet, mmseg, mmpretrain' '$(PIP) -r $(SET); \
	    $(RUN) -c "import cv2" || $(PIP) --force-reinstall --no-deps opencv-python-headless'

# The name of a wheel does not tell for which torch it was compiled, nor whether for a GPU.
$(DONE)/fits: $(DONE)/packages
	@$(STEP) $@ 'mmcv fits this torch (if not, compiled in about 10 minutes on 2 cores)' \
	    '$(RUN) requirements/mmcv_fits.py || \
	    $(BUILD_MMCV) --force-reinstall --no-cache-dir --no-binary $(MMCV)'

# The operators are compiled below, so that only what has changed is compiled again. openmim asks
# for openxlab, which asks for a setuptools that torch is too new for.
$(DONE)/mmattn: $(DONE)/fits requirements/peft.txt $(or $(WHEEL),pyproject.toml setup.py mmattn_configs.py)
	@$(STEP) $@ 'mmattn, and what tests it' '$(if $(WHEEL), \
	    $(PIP) --force-reinstall --no-deps $(WHEEL); $(PIP) -c $(SET) "$(WHEEL)$(EXTRAS)", \
	    CXX=false MMATTN_CUDA=0 $(PIP) --no-build-isolation -c $(SET) -e ".$(EXTRAS)"); \
	    $(PIP) --no-deps -c $(COMMON) openmim; \
	    $(PIP) --no-deps --upgrade --target $(VENV)/peft -r requirements/peft.txt'

CSRC := setup.py $(wildcard mmattn/ops/csrc/* mmattn/ops/csrc/*/*)
$(DONE)/operators: $(DONE)/mmattn $(if $(WHEEL),,$(CSRC))
	@$(STEP) $@ 'compiled operators (some minutes)' \
	    '$(if $(WHEEL),,$(RUN) setup.py build_ext --inplace)'

# Away from the sources, which Python would otherwise import in the place of a wheel.
$(DONE)/checked: $(DONE)/mmattn | $(DONE)/operators
	@cd $(VENV) && bin/python -m mmattn.doctor
	@touch $@

# ---- Work

demo: setup ## Train a small detector on generated images, evaluate it and draw what it finds
	$(RUN) tools/demo.py $(DEMO)

test: setup ## Run all tests, one process a core
	OMP_NUM_THREADS=1 $(RUN) $(PYTEST)

wheel: setup ## Build the sdist, and from it the wheel, in dist/
	rm -rf dist
	$(RUN) -m build --no-isolation
	$(RUN) -m pytest tests/test_distributions.py --distributions=dist

# From a folder without sources: configs and tools are those inside the wheel. Left out are the
# tests of single kernels, which are the same for both stacks, and those that need the sources.
test-upstream: wheel ## Test the wheel beside OpenMMLab's own releases, in another environment
	$(MAKE) setup VENV=$(UPSTREAM) STACK=openmmlab WHEEL=$$(echo dist/*.whl)
	rm -rf build/upstream && mkdir -p build/upstream/docs
	cp -r tests pyproject.toml build/upstream
	cp -r docs/generate build/upstream/docs
	ln -s $(CURDIR)/$(UPSTREAM)/lib/python3*/site-packages/mmattn/.mim/* build/upstream
	cd build/upstream && OMP_NUM_THREADS=1 $(CURDIR)/$(UPSTREAM)/bin/python $(PYTEST) \
	    --installed=$$(echo $(CURDIR)/dist/*.whl) --ignore=tests/ops --ignore=tests/docs \
	    --ignore=tests/benchmarks --ignore=tests/test_setup.py --ignore=tests/test_distributions.py \
	    --ignore=tests/test_release.py --ignore=tests/test_architecture.py

docs: setup ## Write the pages that are made from other files, and build the site into site/
	$(RUN) docs/generate/model_zoo.py
	$(RUN) docs/generate/troubleshooting.py
	$(RUN) -m mkdocs build
	@echo 'open site/index.html'

KERNELS = $(wildcard mmattn/ops/csrc/*.h mmattn/ops/csrc/*/*)

lint: $(DONE)/mmattn ## Check style and types, change nothing
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(KERNELS)
	$(VENV)/bin/codespell
	$(VENV)/bin/mypy

format: $(DONE)/mmattn ## Mend style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(KERNELS)

clean: ## Remove the environments and what was built; work_dirs stays
	rm -rf .venv .venv-upstream build dist site *.egg-info mmattn/.mim .pytest_cache .ruff_cache \
	    .mypy_cache
