# Two commands: `make train` and `make test`. Both first create .venv if it is missing or stale.
#   make train ARGS="--update.method bypass-token --seed 1"      any flag of `alp train`
# Every environment has the exact versions in requirements/*.txt; `make lock` updates them (CONTRIBUTING.md).
# Tests run in JOBS processes, each taking one file at a time. The default suits two cores: one process more than cores,
# because many tests wait for subprocesses.
PYTHON ?= python3
JOBS ?= 3
PYTEST := -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
BIN := .venv/bin
tests-of-transformers := tests/layers/test_architectures.py tests/layers/test_attach.py tests/layers/test_recompute.py
tests-of-adapters := tests/integrations/test_peft.py tests/alp/test_adapters.py tests/alp/test_models_real.py
$(foreach version,5.0 5.5 5.12,$(eval tests-transformers-$(version) := $(tests-of-transformers) $(tests-of-adapters)))
tests-transformers-5.20 := $(tests-of-transformers) $(tests-of-adapters)
tests-oldest := $(tests-of-transformers) $(tests-of-adapters) tests/alp/test_samplers.py tests/alp/test_run.py tests/alp/test_tasks.py \
  tests/alp/test_tools.py tests/alp/test_quiet.py
tests-bitsandbytes := tests/integrations/test_bitsandbytes.py
tests-verl := tests/integrations/test_verl.py tests/integrations/test_verl_head.py tests/integrations/test_verl_sigma.py tests/integrations/test_openrlhf.py

.PHONY: train test test-newest test-all bench docs lint lock lock-keep clean

train:
	@$(PYTHON) scripts/environment.py train
	$(BIN)/alp train $(ARGS)

test:
	@$(PYTHON) scripts/environment.py test
	@echo "all tests: about fifteen minutes on two cores"
	$(BIN)/python $(PYTEST) $(ARGS)

# The same tests with the newest versions on the index, in .venv-newest: run before the locks are updated.
test-newest:
	@$(PYTHON) scripts/environment.py test --newest
	.venv-newest/bin/python $(PYTEST) $(ARGS)

# All tests, and some with other versions of transformers or with trainers whose pins conflict, each in .venv-NAME.
test-all: test docs test-oldest test-transformers-5.0 test-transformers-5.5 test-transformers-5.12 test-transformers-5.20 \
  test-bitsandbytes test-verl

test-%:
	@$(PYTHON) scripts/environment.py test --overlay $*
	.venv-$*/bin/python -c "import $(or $(module-$*),$(firstword $(subst -, ,$*)))"  # without it the tests would be skipped
	.venv-$*/bin/python $(PYTEST) $(tests-$*) $(ARGS)
module-oldest := transformers

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

# lock: the newest versions that pyproject.toml allows. lock-keep: change only what pyproject.toml requires.
lock lock-keep:
	@$(PYTHON) scripts/environment.py train
	$(BIN)/python scripts/lock.py $(if $(filter lock-keep,$@),--keep)

clean:
	rm -rf .venv .venv-* build dist alp_kernels/native/_native.so
