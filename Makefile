# Two commands do everything on a fresh machine with Python 3.11+ and make: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= demo

.PHONY: demo test slow lint format clean

demo: $(VENV)/.installed
	$(BIN)/python -m models.fashion_mlp -o $(OUT) --activation prelu
	@echo "--- quality before"
	$(BIN)/python -m models.fashion_mlp -o $(OUT) --measure $(OUT)/model.onnx
	$(BIN)/onnxcollapse optimize $(OUT)/model.onnx -o $(OUT)/small.onnx --calib $(OUT)/calib.npz --report $(OUT)/report
	@echo "--- quality after"
	$(BIN)/python -m models.fashion_mlp -o $(OUT) --measure $(OUT)/small.onnx

# One process for each core and one thread each: what tests multiply is too small for threads to help.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto --dist loadgroup

slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(OUT) .mypy_cache .ruff_cache .pytest_cache .hypothesis
