# make demo: two small GPTs trained on the CPU, one with AdamW and one with Sophia-G. make test, make lint: the checks.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: .venv/installed
	$(BIN)/python data/shakespeare_char/prepare.py
	$(BIN)/python train_adam.py config/train_shakespeare_char_adam.py --out_dir=out/demo_adam --overwrite=True
	$(BIN)/python train_sophiag.py config/train_shakespeare_char_sophiag.py --out_dir=out/demo_sophiag --overwrite=True
	$(BIN)/python compare.py out/demo_adam out/demo_sophiag --out=out/demo
	$(BIN)/python sample.py --out_dir=out/demo_sophiag --max_new_tokens=400

.venv/installed-eval: requirements-eval.txt .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-eval.txt
	touch $@

test: .venv/installed-eval
	$(BIN)/python -m pytest -n 2

lint: .venv/installed
	$(BIN)/ruff check .

clean:
	rm -rf .venv out
