# Lockstep: build it, run it, test it. `make` alone says how.

MODEL      ?= models/SmolLM2-135M-Instruct.Q4_1.gguf
WORLD_SIZE ?= 1
REPLICAS   ?= 1

# Without pipefail a failed test run would end in the success of the awk behind it.
SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

# One profile for everything, so that a machine builds each crate once.
CARGO := cargo
BUILD := --release --locked
VENV  := .venv
NODE  := tests/clients/node clients/examples/node
CHROMIUM := /usr/bin/chromium
AS_ROOT := $$([ "$$(id -u)" = 0 ] || echo sudo)
RUN   := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
# Where pip puts CUDA's compiler, which opens a second library of its own by name. The shell finds Python's version.
NVRTC := $(CURDIR)/$(VENV)/lib/python3*/site-packages/nvidia/cu13/lib

.PHONY: help up build test kernels fetch lint fmt

help:
	@echo 'make up     start a cluster on this machine (MODEL=, WORLD_SIZE=, REPLICAS=)'
	@echo 'make test   run all tests, after fetching what they need'
	@echo 'make kernels  compile every GPU kernel, which needs no GPU; part of make test'
	@echo 'make lint   clippy and buf; make fmt formats'
	@echo 'make fetch  get models and tokenizers'

up: build
	@if [ ! -e '$(MODEL)' ] && [ '$(origin MODEL)' = file ]; then python3 deploy/fetch_demo_model.py; fi
	exec target/release/lockstep up '$(MODEL)' --world-size '$(WORLD_SIZE)' --replicas '$(REPLICAS)'

build:
	$(CARGO) build $(BUILD) --workspace --bins

# Integration tests start the real programs, which cargo builds for their own packages' tests alone.
test: fetch build kernels
	$(CARGO) test $(BUILD) --workspace --no-fail-fast 2>&1 | awk '{ print; fflush() } \
	  /^test result:/ { passed += $$4; failed += $$6; ignored += $$8 } \
	  END { printf "\n%d tests passed, %d failed, %d ignored\n", passed, failed, ignored }'

# Fails on errors, and on hot kernels that registers do not suffice for.
kernels: $(VENV)/installed build
	LD_LIBRARY_PATH="$$(echo $(NVRTC))" target/release/lockstep-worker kernels --arch sm_80 --arch sm_90a

fetch: $(VENV)/installed $(VENV)/clients/installed $(NODE:%=%/node_modules/installed) $(CHROMIUM)
	python3 deploy/fetch_demo_model.py
	$(RUN) python3 tests/fetch_tokenizers.py

lint: $(VENV)/installed
	$(CARGO) clippy $(BUILD) --workspace --all-targets -- -D warnings
	cd proto && ../$(VENV)/bin/buf lint

fmt:
	$(CARGO) fmt --all

# Plain Debian has Python without venv; the second line installs that.
$(VENV)/installed: tests/requirements.txt
	python3 -m venv $(VENV) || { rm -rf $(VENV); \
	  $(AS_ROOT) sh -c 'apt-get update && apt-get install -y python3-venv'; \
	  python3 -m venv $(VENV); }
	$(VENV)/bin/pip install --quiet --requirement tests/requirements.txt
	touch $@

# The client's own code is used where it stands; what the contract generates beside it is made by the installation.
$(VENV)/clients/installed: tests/clients/requirements.txt clients/python/pyproject.toml clients/python/hatch_build.py \
    $(wildcard proto/lockstep/v1/*.proto) | $(VENV)/installed
	python3 -m venv $(VENV)/clients
	$(VENV)/clients/bin/pip install --quiet --requirement $< --editable clients/python
	touch $@

# In which the tests look at the page.
$(CHROMIUM):
	$(AS_ROOT) sh -c 'apt-get update && apt-get install -y --no-install-recommends chromium'

%/node_modules/installed: %/package.json | $(VENV)/installed
	cd $* && $(RUN) npm install --silent --no-package-lock --no-audit --no-fund
	touch $@
