# The two commands of the README are `make demo` and `make test`; each sets up what it needs first.

PYTHON ?= python3
DEMO ?= gcvit
VENV := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
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

lint: setup ## Check style, change nothing
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .

format: setup ## Mend style
	$(VENV)/ruff check --fix .
	$(VENV)/ruff format .

clean: ## Remove the environment and what was built; work_dirs stays
	rm -rf .venv build dist *.egg-info mmattn/.mim .pytest_cache .ruff_cache
