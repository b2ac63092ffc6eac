# Every target that needs .venv brings it up to date first; where it is, that takes milliseconds.
# ARGS is handed on: make test ARGS="tests/data -k sudoku", make demo ARGS="trainer.max_steps=20".

PYTHON_IN_VENV := .venv/bin/python
# Two processes for two cores and some 10 GB; ARGS="-n 0" for one, as --pdb wants it.
IN_PARALLEL := -n 2 --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help venv demo finetune-demo export-demo serve-demo test test-slurm test-all test-gpu lint format clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

venv: ## Make .venv and install the project into it (PYTHON=... to choose the interpreter)
	@scripts/bootstrap.sh

demo: venv ## Train a small model on Sudoku, evaluate it and generate, on the CPU
	$(PYTHON_IN_VENV) launch/demo.py $(ARGS)

finetune-demo: venv ## Teach the model of the demo another task with LoRA, merge it, compare with peft
	$(PYTHON_IN_VENV) launch/finetune_demo.py $(ARGS)

export-demo: venv ## Export the model of the demo: build engines, compare with PyTorch, solve a puzzle
	$(PYTHON_IN_VENV) export/demo.py $(ARGS)

serve-demo: venv ## Serve the model of the demo: five puzzles through OpenAI's client, and the page
	$(PYTHON_IN_VENV) launch/serve_demo.py $(ARGS)

test: venv ## Run the tests, without the slow ones
	$(PYTHON_IN_VENV) -m pytest -q -m "not slow" --ignore=tests/slurm $(IN_PARALLEL) $(ARGS)

test-slurm: venv ## Run the jobs that CI runs on a real Slurm, started here (installed too, as root on Debian or Ubuntu)
	$(PYTHON_IN_VENV) -m pytest -q -m "not slow" tests/slurm $(ARGS)

test-all: venv ## Run all tests, the slow ones and every job on Slurm too
	$(PYTHON_IN_VENV) -m pytest -q $(ARGS)

test-gpu: venv ## Run what needs GPUs: parity and layouts on nccl, engines with their latencies
	$(PYTHON_IN_VENV) -m pytest -q -s tests/gpu $(ARGS)

lint: venv ## Check style, formatting and types, shell scripts and the Dockerfile
	$(PYTHON_IN_VENV) -m ruff check
	$(PYTHON_IN_VENV) -m ruff format --check
	$(PYTHON_IN_VENV) -m mypy
	.venv/bin/shellcheck .ci/run scripts/*.sh slurm/testcluster/*.sh slurm/example_dgx_h100.sbatch slurm/serve.sbatch
	.venv/bin/hadolint docker/Dockerfile

format: venv ## Format the code and apply the safe fixes
	$(PYTHON_IN_VENV) -m ruff check --fix
	$(PYTHON_IN_VENV) -m ruff format

clean: ## Remove caches and build outputs; .venv and runs/ stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
