# Two commands: `make train` and `make test`. Both make .venv first where it is missing or stale.
#   make train ARGS="--update.method bypass-token --seed 1"      any flag of `alp train`
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test bench docs lint clean

train:
	@$(PYTHON) scripts/environment.py train
	$(BIN)/alp train $(ARGS)

test:
	@$(PYTHON) scripts/environment.py test
	$(BIN)/python -m pytest $(ARGS)

# Other versions of transformers, and trainers whose pins conflict: each in .venv-NAME, on top of .venv.
test-%:
	@$(PYTHON) scripts/environment.py test --overlay $*
	.venv-$*/bin/python -c "import $(firstword $(subst -, ,$*))"  # tests skip what they cannot import
	.venv-$*/bin/python -m pytest $(tests-$*) $(ARGS)

bench:
	@$(PYTHON) scripts/environment.py bench
	$(BIN)/python -m pytest bench/ --benchmark-only $(ARGS)

docs:
	@$(PYTHON) scripts/environment.py docs
	$(BIN)/mkdocs build --strict

lint:
	@$(PYTHON) scripts/environment.py dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist alp_kernels/native/_native.so
