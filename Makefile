# make demo   train a tiny LLaVA on all layers and on a quarter of them, and compare (about 5 minutes after installation)
# make test   the whole test suite, with the real LLaVA and real ZeRO-3 on two CPU ranks
# make lint   ruff, and pyright over the package as it is installed (patches/ inside it)
# make wheel-smoke   build sdist and wheel, and run the wheel from a clean environment
# make test-bunny BUNNY_ROOT=DIR   the tests against a checkout of Bunny
# make test-pinned   the tests with the versions that LLaVA itself pins: torch 2.1.2, deepspeed 0.12.6 and so on (Python 3.10 or 3.11)
# make test-newest   the tests with the newest versions that this package takes
# make gpu    on a machine with an NVIDIA GPU: every test that needs one, step times, the memory plan (20 minutes on an H100)
# make soak SOAK_MINUTES=20   kill, stop, starve and start twice what takes long, at random moments (SOAK_SEED repeats a sequence)
#
# Each makes the virtual environment it needs. Python 3.10 to 3.12, make and g++ are enough.
# torch is installed from your package index: on Linux that is a CUDA build of several gigabytes. TORCH names another one, and
# PINNED_TORCH that of test-pinned:
#   make test TORCH=torch==2.13.0+cpu PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
TORCH ?= torch==2.13.0
# the version made for that torch; Bunny's SigLIP tower imports it
TORCHVISION ?= torchvision==0.28.0
PINNED_TORCH ?= torch==2.1.2
VENV ?= .venv
BUNNY_VENV ?= .venv-bunny
PINNED_VENV ?= .venv-pinned
NEWEST_VENV ?= .venv-newest
PYTEST_FLAGS ?= -q
SOAK_MINUTES ?= 20

export HF_HUB_OFFLINE = 1
export OMP_NUM_THREADS ?= 1

.PHONY: test demo lint gpu soak test-bunny test-pinned test-newest wheel-smoke clean
.PHONY: install install-llava install-bunny dependencies-llava dependencies-bunny
install: install-llava
install-llava: $(VENV)/.ready
install-bunny: $(BUNNY_VENV)/.ready
dependencies-llava: $(VENV)/.dependencies
dependencies-bunny: $(BUNNY_VENV)/.dependencies

COMMON = Makefile tests/requirements-common.txt

# make-venv FOLDER, TORCH, newest 3.x of Python that has that torch
define make-venv
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, $(3)) else f"error: Python {v[0]}.{v[1]} given, 3.10 to 3.$(3) needed; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(1)
	$(1)/bin/pip install -q --upgrade pip 'setuptools>=77,<81' wheel
	$(1)/bin/pip install -q $(2)
endef

$(VENV)/.dependencies: $(COMMON) tests/requirements-llava.txt
	$(call make-venv,$(VENV),$(TORCH),12)
	$(VENV)/bin/pip install -q -r tests/requirements-llava.txt
	$(VENV)/bin/pip install -q --no-deps llava-torch==1.2.2.post1
	DS_BUILD_OPS=0 $(VENV)/bin/pip install -q --no-build-isolation --no-deps deepspeed==0.16.9
	touch $@

$(BUNNY_VENV)/.dependencies: $(COMMON) tests/requirements-bunny.txt
	$(call make-venv,$(BUNNY_VENV),$(TORCH),12)
	$(BUNNY_VENV)/bin/pip install -q -r tests/requirements-bunny.txt
	$(BUNNY_VENV)/bin/pip install -q --no-deps timm==1.0.31 $(TORCHVISION)
	DS_BUILD_OPS=0 $(BUNNY_VENV)/bin/pip install -q --no-build-isolation --no-deps deepspeed==0.18.9
	touch $@

$(PINNED_VENV)/.dependencies: $(COMMON) tests/requirements-pinned.txt
	$(call make-venv,$(PINNED_VENV),$(PINNED_TORCH),11)
	$(PINNED_VENV)/bin/pip install -q -r tests/requirements-pinned.txt
	$(PINNED_VENV)/bin/pip install -q --no-deps llava-torch==1.2.2.post1
	DS_BUILD_OPS=0 $(PINNED_VENV)/bin/pip install -q --no-build-isolation --no-deps deepspeed==0.12.6
	touch $@

$(NEWEST_VENV)/.dependencies: $(COMMON) tests/requirements-newest.txt
	$(call make-venv,$(NEWEST_VENV),$(TORCH),12)
	$(NEWEST_VENV)/bin/pip install -q -r tests/requirements-newest.txt
	$(NEWEST_VENV)/bin/pip install -q --no-deps llava-torch==1.2.2.post1
	DS_BUILD_OPS=0 $(NEWEST_VENV)/bin/pip install -q --no-build-isolation --no-deps deepspeed==0.19.7
	touch $@

# __init__.py holds the version, which pip notes when it installs
%/.ready: %/.dependencies setup.py pyproject.toml llava_region/__init__.py
	$*/bin/pip install -q --no-deps --no-build-isolation -e .
	touch $@

test: $(VENV)/.ready
	$(VENV)/bin/python -m pytest $(PYTEST_FLAGS)

test-pinned: $(PINNED_VENV)/.ready
	$(PINNED_VENV)/bin/python -m pytest $(PYTEST_FLAGS)

test-newest: $(NEWEST_VENV)/.ready
	$(NEWEST_VENV)/bin/python -m pytest $(PYTEST_FLAGS)

soak: $(VENV)/.ready
	SOAK_MINUTES=$(SOAK_MINUTES) $(VENV)/bin/python -m pytest $(PYTEST_FLAGS) tests/soak

gpu: $(VENV)/.ready
	$(VENV)/bin/python benchmarks/gpu.py --out gpu-report

demo: $(VENV)/.ready
	$(VENV)/bin/python scripts/demo.py

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	rm -rf build/types && mkdir -p build/types && cp -r llava_region pyproject.toml build/types && cp -r patches build/types/llava_region/patches
	cd build/types && $(abspath $(VENV))/bin/pyright --pythonpath $(abspath $(VENV))/bin/python

wheel-smoke: $(VENV)/.ready
	bash .ci/wheel-smoke $(VENV)/bin/python

test-bunny: $(BUNNY_VENV)/.ready
	@test -f "$(BUNNY_ROOT)/bunny/train/train.py" || { echo "error: BUNNY_ROOT='$(BUNNY_ROOT)' is not a checkout of Bunny; give one with make test-bunny BUNNY_ROOT=DIR" >&2; exit 2; }
	BUNNY_ROOT=$(abspath $(BUNNY_ROOT)) PYTHONPATH=$(abspath $(BUNNY_ROOT)) $(BUNNY_VENV)/bin/python -m pytest $(PYTEST_FLAGS) -k bunny

clean:
	rm -rf $(VENV) $(BUNNY_VENV) $(PINNED_VENV) $(NEWEST_VENV) demo-output build dist
