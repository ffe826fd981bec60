# Two commands: `make train` and `make test`. Both make .venv first where it is missing or stale.
#   make train ARGS="--update.method bypass-token --seed 1"      any flag of `alp train`
PYTHON ?= python3
BIN := .venv/bin
tests-of-transformers := tests/test_architectures.py tests/test_attach.py tests/test_recompute.py tests/test_peft.py
$(foreach version,4.57 5.0 5.5 5.12,$(eval tests-transformers-$(version) := $(tests-of-transformers)))
tests-bitsandbytes := tests/test_bitsandbytes.py
tests-verl := tests/test_verl.py tests/test_openrlhf.py

.PHONY: train test test-all bench docs lint clean

train:
	@$(PYTHON) scripts/environment.py train
	$(BIN)/alp train $(ARGS)

test:
	@$(PYTHON) scripts/environment.py test
	$(BIN)/python -m pytest $(ARGS)

# Other versions of transformers, and trainers whose pins conflict: each in .venv-NAME, on top of .venv.
test-all: test docs test-transformers-4.57 test-transformers-5.0 test-transformers-5.5 test-transformers-5.12 test-bitsandbytes test-verl

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
