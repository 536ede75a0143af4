# make demo: train two small GPTs on the CPU, with AdamW and with Sophia-G. make test, make lint: the checks of .ci/run.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint clean

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(PIP) -r requirements-dev.txt
	touch $@

.venv/installed-eval: requirements-eval.txt .venv/installed-dev
	$(PIP) -r requirements-dev.txt -r requirements-eval.txt
	touch $@

demo: .venv/installed
	$(BIN)/python data/shakespeare_char/prepare.py
	$(BIN)/python train_adam.py config/train_shakespeare_char_adam.py --out_dir=out/demo_adam --overwrite=True
	$(BIN)/python train_sophiag.py config/train_shakespeare_char_sophiag.py --out_dir=out/demo_sophiag --overwrite=True
	$(BIN)/python compare.py out/demo_adam out/demo_sophiag --out=out/demo
	$(BIN)/python sample.py --out_dir=out/demo_sophiag --max_new_tokens=400

test: .venv/installed-eval
	$(BIN)/python -m pytest -n 2

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv out
