# SPDX-License-Identifier: BSD-3-Clause
#
# Short names for what developers do often.  No build rules stand here: CFFI
# builds (nbd_mirror/_build.py), scripts/setup prepares.

PYTHON := .venv/bin/python
C_FILES = $(shell find csrc tests/c tests/fuzz benchmarks -name build -prune -o -name '*.[ch]' -print)

.PHONY: help setup build check check-c check-e2e check-vm lint fmt bench demo clean

help:
	@echo 'setup      packages, .venv, build     build      rebuild the C code'
	@echo 'check      lint and every test        check-c    C tests, sanitizers'
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
	clang-format -i $(C_FILES)

bench: build
	benchmarks/run

demo:
	scripts/demo

clean:
	rm -rf build dist nbd_mirror/*.so tests/c/build tests/fuzz/build
	find . -name __pycache__ -prune -exec rm -rf {} +
