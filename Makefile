# `make demo` and `make test` set up everything they need in .venv; Python ≥ 3.11 is all that must be there.
PYTHON ?= python3
BIN := .venv/bin
LINKS := data_prep launch model pipeline

.PHONY: demo demo-clean test test-slow lint clean
demo: .venv/demo
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/demo.sh demo

demo-clean:
	rm -rf demo

test: lint .venv/peers
	$(BIN)/pytest -m "not slow" -n auto --maxprocesses 8 --dist loadgroup

test-slow: .venv/test .venv/peers
	$(BIN)/pytest -m slow

lint: .venv/test .types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

clean: demo-clean
	rm -rf .venv .types build *.egg-info

# The environment: exact versions from constraints.txt, one extra a stamp
.venv/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vitscale needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv 2>/dev/null || { \
		$(PYTHON) -m venv --clear --without-pip .venv && .venv/bin/python .ci/get_pip.py; } || { rm -rf .venv; exit 1; }

.venv/torch: constraints.txt | .venv/bin/pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	touch $@

.venv/demo .venv/test: .venv/%: .venv/torch pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

# timm, to compare with, lies apart: beside a torch without CUDA its torchvision can only be imported as tests/peers.py does
.venv/peers: constraints.txt .venv/test
	rm -rf $@
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps --target $@ timm torchvision
	touch $@

# What the type checker reads: the folders under the names by which they are imported
.types: Makefile
	rm -rf $@
	mkdir -p $@/vitscale
	for folder in $(LINKS); do ln -s ../../$$folder $@/vitscale/$$folder; done
	for file in vitscale/*.py; do ln -s ../../$$file $@/$$file; done
