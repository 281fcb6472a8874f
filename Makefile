# Two commands: `make train` sets everything up and trains on embedded data; `make test` runs the tests.
# `make parity` compares with timm, transformers, netcal and PyTorch, in an environment of its own.
.PHONY: train test lint parity clean
.DELETE_ON_ERROR:

# The first Python of 3.11 or newer that runs; or say which: make train PYTHON=python3.13
PYTHON ?= $(shell for p in python3 python python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
RUN := $(VENV)/bin/python
PARITY := .venv-parity

train: $(VENV)/installed
	@$(RUN) main.py --config=configs/digits.py --workdir=runs/digits

test: $(VENV)/installed
	$(RUN) -m pytest -q -n 2 --dist worksteal

lint: $(VENV)/installed
	$(RUN) -m ruff check .

parity: $(PARITY)/installed
	$(PARITY)/bin/python -m pytest -q -n 2 tests/parity

$(VENV)/installed: requirements.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; install one, or make train PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "setting up $(VENV) with $$($(PYTHON) --version) (about 1 GB, a minute or two)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# torchvision is only there because timm imports it: its compiled half, which would want a certain torch, is not used.
# timm asks Pillow for what 13 refuses.
$(PARITY)/installed: requirements.txt
	@echo "setting up $(PARITY) with PyTorch, timm, transformers and netcal (a few GB)"
	@$(PYTHON) -m venv --clear $(PARITY)
	@$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 huggingface_hub safetensors
	@$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check netcal==1.4.0 onnx==1.23.2
	@$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps torchvision==0.28.0 timm==1.0.31
	@$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check "pillow<13"
	@touch $@

clean:
	rm -rf $(VENV) $(PARITY)
