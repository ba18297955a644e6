# Every target is one call of a module; logic lives in Python.
PYTHON ?= python3
BIN := .venv/bin
# On a GPU machine: make setup CONSTRAINTS=
CONSTRAINTS ?= constraints-cpu.txt
RUN := $(BIN)/python -m distill
.DEFAULT_GOAL := help
.PHONY: help setup smoke demo digits needle lab-quick test fuzz lint bench crash coordcheck lr-transfer config clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-11s %s\n", $$1, $$2}'

setup: .venv/.done ## Create .venv with everything that smoke, test and bench need

.venv/.done: pyproject.toml setup.py $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[dev]'
	@touch $@

smoke: setup ## The main job, small: teacher, captured targets, four students, a table (ARGS="seed=7 ...")
	$(RUN) job=codistill experiment=smoke $(ARGS)

demo: setup ## The main job with four times the tokens (19 minutes on 2 cores)
	$(RUN) job=codistill experiment=demo $(ARGS)

digits: setup ## The main job on text and images: who reads handwritten digits how well (ARGS="seed=7 ...")
	$(RUN) job=codistill experiment=digits $(ARGS)

needle: setup ## A tiny student learns retrieval, then is tried within and beyond its length (ARGS="seed=1 ...")
	$(RUN) experiment=needle $(ARGS)

lab-quick: setup ## Weightings compared on a language whose law is known: two regimes, four arms, two pairs (at most 10 minutes)
	$(RUN) job=lab study=quick lab.evidence=runs/lab/quick.jsonl $(ARGS)

.venv/.kernels: .venv/.done
	$(BIN)/pip install -q $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[kernels]'
	@touch $@

test: setup .venv/.kernels lint ## Linters, types, import contracts, all tests (ARGS for pytest)
	$(BIN)/pytest -n 2 --dist loadfile $(ARGS)

fuzz: setup ## Random search: tests that draw their input, with new input until the time is up (MINUTES=5 SEED=0 ONLY=name)
	$(BIN)/python -m tests.fuzz $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED)) $(if $(ONLY),--only "$(ONLY)")

lint: setup ## ruff, mypy, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup ## Measurements of tests/bench into runs/bench (ONLY=name for one; codec takes SEED= and ROWS=)
	$(BIN)/python -m tests.bench $(ONLY)

crash: setup ## Kill writers, flip bits; fails unless nothing is lost or unnoticed (ONLY=cache KILLS=200 FLIPS=10000 SECONDS=60 SEED=0)
	$(BIN)/python -m tests.crash $(if $(ONLY),--only $(ONLY)) $(if $(SECONDS),--seconds $(SECONDS)) $(if $(KILLS),--kills $(KILLS)) $(if $(FLIPS),--flips $(FLIPS)) $(if $(SEED),--seed $(SEED))

coordcheck: setup ## Does a step of training change all outputs alike at every width? Slopes and a chart
	$(BIN)/python -m tests.bench coordcheck

lr-transfer: setup ## Learning-rate sweep over three widths, both parametrisations (10 minutes on 2 cores)
	$(BIN)/python -m tests.bench lr_transfer

config: setup ## Print the resolved run and start nothing (JOB=teacher ARGS=...)
	@$(RUN) job=$(JOB) $(ARGS) --cfg job --resolve

clean: ## Remove runs, builds and tool caches, keep .venv
	rm -rf runs outputs multirun build dist .mypy_cache .ruff_cache .hypothesis .import_linter_cache
