# make demo    the main job: train a small model, prune, factorise, quantize, lower, verify, time it
# make test    the tests
# make lint    ruff and mypy
# Each sets up .venv from constraints.txt on first use and reuses it while constraints.txt and pyproject.toml stand.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt
TESTS := --numprocesses 2 --dist loadfile
READY := $(VENV)/.ready

export OMP_WAIT_POLICY := passive

.PHONY: demo test lint clean

demo: $(READY) demo/model.pt
	cd demo && ../$(BIN)/graphopt optimize model.pt --passes prune,svd,int8 --data calibration.npz --eval test.npz

demo/model.pt: tools/train_digits.py | $(READY)
	$(BIN)/python tools/train_digits.py demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TESTS)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy -p graphopt

# torchvision pins the torch it was built with; its models run on any, so it is installed without its dependencies.
$(READY): $(CONSTRAINTS) pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev,onnxsim,tensorrt]"
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --no-deps torchvision
	touch $(READY)

clean:
	rm -rf $(VENV) demo
