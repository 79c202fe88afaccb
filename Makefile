# SPDX-License-Identifier: BSD-3-Clause
#
# Short names for frequent tasks of developers.  This file has no build rules: CFFI
# builds (nbd_mirror/_build.py), and scripts/setup prepares.

PYTHON := .venv/bin/python
C_FILES = $(shell find csrc tests/c tests/unit tests/fuzz benchmarks -name build -prune -o -name '*.[ch]' -print)

.PHONY: help setup build check quick check-c check-e2e check-vm lint fmt bench demo clean

help:
	@echo 'setup      packages, .venv, build     build      rebuild the C code'
	@echo 'check      lint and every test        check-c    C tests, sanitizers'
	@echo 'quick      pytest without the slow tests: three minutes'
	@echo 'check-e2e  end-to-end tests           check-vm   virtual-machine test'
	@echo 'lint       layout and types           fmt        lay the code out'
	@echo 'bench      the benchmark              demo       the demonstration'
	@echo 'clean      remove what builds made'

setup:
	scripts/setup

build:
	$(PYTHON) -m nbd_mirror._build

check:
	scripts/test

quick: build
	$(PYTHON) -m pytest -m 'not slow' -n $$(($$(nproc) + 2)) --dist loadgroup --no-loadscope-reorder \
	  tests/unit tests/e2e

check-c:
	$(MAKE) -C tests/c check

check-e2e: build
	$(PYTHON) -m pytest tests/e2e

check-vm: build
	$(PYTHON) -m pytest tests/vm

lint:
	scripts/lint

fmt:
	.venv/bin/ruff check --quiet --fix .
	.venv/bin/ruff format --quiet .
	.venv/bin/clang-format -i $(C_FILES)

bench: build
	benchmarks/run

demo:
	scripts/demo

clean:
	rm -rf build dist nbd_mirror/*.so tests/c/build tests/fuzz/build
	find . -name __pycache__ -prune -exec rm -rf {} +
