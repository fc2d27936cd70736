# make demo   train a tiny LLaVA on all layers and on a quarter of them, and compare (about 5 minutes after installation)
# make test   the whole test suite, with the real LLaVA and real ZeRO-3 on two CPU ranks
# make lint   ruff
# make test-bunny BUNNY_ROOT=DIR   the tests against a checkout of Bunny
#
# Each makes the virtual environment it needs. Python 3.10 to 3.12, make and g++ are enough.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BUNNY_VENV ?= .venv-bunny
PYTEST_FLAGS ?= -q

export HF_HUB_OFFLINE = 1
export OMP_NUM_THREADS ?= 1

.PHONY: test demo lint test-bunny clean install
install: $(VENV)/.ready

$(VENV)/.ready: Makefile setup.py pyproject.toml tests/requirements-llava.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 12) else f"error: Python {v[0]}.{v[1]} given, 3.10 to 3.12 needed; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q --upgrade pip 'setuptools<81' wheel
	$(VENV)/bin/pip install -q $(TORCH)
	$(VENV)/bin/pip install -q -r tests/requirements-llava.txt
	$(VENV)/bin/pip install -q --no-deps llava-torch==1.2.2.post1
	DS_BUILD_OPS=0 $(VENV)/bin/pip install -q --no-build-isolation --no-deps deepspeed==0.16.9
	$(VENV)/bin/pip install -q --no-deps --no-build-isolation -e .
	touch $@

$(BUNNY_VENV)/.ready: Makefile setup.py pyproject.toml tests/requirements-bunny.txt
	$(PYTHON) -m venv $(BUNNY_VENV)
	$(BUNNY_VENV)/bin/pip install -q --upgrade pip 'setuptools<81' wheel
	$(BUNNY_VENV)/bin/pip install -q $(TORCH)
	$(BUNNY_VENV)/bin/pip install -q -r tests/requirements-bunny.txt
	$(BUNNY_VENV)/bin/pip install -q --no-deps timm torchvision
	DS_BUILD_OPS=0 $(BUNNY_VENV)/bin/pip install -q --no-build-isolation --no-deps deepspeed==0.18.9
	$(BUNNY_VENV)/bin/pip install -q --no-deps --no-build-isolation -e .
	touch $@

test: $(VENV)/.ready
	$(VENV)/bin/python -m pytest $(PYTEST_FLAGS)

demo: $(VENV)/.ready
	$(VENV)/bin/python scripts/demo.py

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

test-bunny: $(BUNNY_VENV)/.ready
	@test -f "$(BUNNY_ROOT)/bunny/train/train.py" || { echo "error: BUNNY_ROOT='$(BUNNY_ROOT)' is no checkout of Bunny; give one with make test-bunny BUNNY_ROOT=DIR" >&2; exit 2; }
	BUNNY_ROOT=$(abspath $(BUNNY_ROOT)) PYTHONPATH=$(abspath $(BUNNY_ROOT)) $(BUNNY_VENV)/bin/python -m pytest $(PYTEST_FLAGS) -k bunny

clean:
	rm -rf $(VENV) $(BUNNY_VENV) demo-output
