# The commands of this project; `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 6006
.DEFAULT_GOAL := help
.PHONY: help install demo latent-demo gallery studies test test-medium test-plain-kernels test-slow lint types wheel lock docs docs-site board check-gpu clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-19s %s\n", $$1, $$2}'

install: $(VENV)/installed ## create .venv and install the project into it

$(VENV)/installed: pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, but $(PYTHON) is `$(PYTHON) --version`: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: install ## train a diffusion model on handwritten digits, in minutes on a laptop
	$(BIN)/diffusion-lit fit --config configs/edm_digits.yaml

latent-demo: install ## train a VAE on handwritten digits and a diffusion model on its latents, in minutes
	$(BIN)/diffusion-lit fit --config configs/vae_digits.yaml
	$(BIN)/diffusion-lit fit --config configs/latent_digits.yaml

gallery: install ## every editing task on small models, which are trained if need be: runs/gallery/index.html
	$(BIN)/python -m experiments.gallery

studies: install ## run every study in its small form, in 20 minutes on 2 cores: runs/studies/index.html
	$(BIN)/python -m experiments.studies

test: install ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses auto --dist worksteal

test-medium: install ## run the tests that take seconds each, which CI runs too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses auto --dist worksteal -m medium

# Every processor has kernels of its own, whose exp and log differ in the last bit: these tests run on the plainest too.
COMPUTE := grids or last_bit or gradients or noise or preconditioning or conversions or denoiser or guidance or wrappers \
	or views or test_loss or generate or likelihood or analytic or averaging or reconstruction or test_samplers or nets_layers
test-plain-kernels: install ## run the tests that compute with the kernels of a processor without AVX
	ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses auto --dist worksteal -k '$(COMPUTE)'

test-slow: install ## run the tests that take minutes
	$(BIN)/python -m pytest -q -m slow

lint: install ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install ## check types
	$(BIN)/mypy

wheel: install ## build dist/, install the wheel in an environment of its own, and run the commands there
	$(BIN)/python tools/check_wheel.py --out dist

lock: install ## renew requirements.lock: the newest versions that pyproject.toml allows
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --extra dev --extra wandb --extra docs --universal --no-emit-index-url --no-annotate --no-header --quiet --output-file requirements.lock --upgrade

docs: install ## renew what README and docs take from the code: lines of links, the table of recipes
	$(BIN)/python tools/renew_docs.py

docs-site: install ## build the documentation site, strictly and offline: build/site/index.html
	$(BIN)/python -c 'import mkdocs' 2>/dev/null || $(BIN)/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --clean

board: install ## open TensorBoard over all runs: make board PORT=6006
	@$(BIN)/python -c 'import socket, sys; sys.exit(socket.socket().connect_ex(("127.0.0.1", int("$(PORT)"))) == 0)' 2>/dev/null || \
		{ echo "Port $(PORT) is in use, or is no port; choose another, such as make board PORT=6007"; exit 1; }
	@mkdir -p runs
	$(BIN)/tensorboard --logdir runs --port $(PORT)

check-gpu: install ## check everything on one NVIDIA GPU, in 8 minutes: check_gpu.json
	$(BIN)/python tools/check_gpu.py

clean: ## remove caches, not runs and not .venv
	rm -rf .mypy_cache .ruff_cache .pytest_cache build dist *.egg-info
