# Every goal does its own set-up in .venv; see README.md.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
RESULTS ?= benchmarks/results
SOURCES := setup.py $(wildcard tools/*.py) $(shell find csrc -type f)
CPP := $(shell find csrc tests/cuda_emulator -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
# A change of these rebuilds the extension, as a change of its sources does.
SETTINGS := $(CAMKERNELS_CUDA)|$(CAMKERNELS_DEBUG)|$(TORCH_CUDA_ARCH_LIST)|$(CUDA_HOME)|$(CXX)

.PHONY: FORCE help install test demo demo-vac demo-i2c demo-hnc demo-dla bench lint format gpu gpu-compile clean

help:
	@echo "make demo     train with PCL on real images, write demo/"
	@echo "make demo-vac the same with VAC on images of several classes, write demo-vac/"
	@echo "make demo-i2c the same with I2C on images of one object, found by its box, write demo-i2c/"
	@echo "make demo-hnc the same with HNC on images of one class and of several, write demo-hnc/"
	@echo "make demo-dla the same with DLA on images of one small object, at two scales, write demo-dla/"
	@echo "make test     the whole test suite"
	@echo "make bench    benchmarks of this machine, and their report"
	@echo "make lint     ruff, clang-format, mypy"
	@echo "make install  the environment that the others rest on"
	@echo "make gpu RESULTS=dir   on a machine with an NVIDIA GPU and its own torch: build, test, measure"
	@echo "make gpu-compile RESULTS=dir   there too: the benchmark tables beside torch.compile"

install: $(VENV)/.built

$(VENV)/.packages: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13) and "the pinned packages need Python 3.10 to 3.13; make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.settings: $(VENV)/.packages FORCE
	@echo '$(SETTINGS)' | cmp -s - $@ || echo '$(SETTINGS)' > $@

$(VENV)/.built: $(VENV)/.packages $(VENV)/.settings pyproject.toml $(SOURCES)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

test: install
	$(PY) -m pytest -q -n 2 --dist loadgroup

demo: install
	$(PY) examples/train_digit_scenes.py --method pcl --output demo

demo-vac: install
	$(PY) examples/train_digit_scenes.py --method vac --output demo-vac

demo-i2c: install
	$(PY) examples/train_digit_scenes.py --method i2c --output demo-i2c

demo-hnc: install
	$(PY) examples/train_digit_scenes.py --method hnc --output demo-hnc

demo-dla: install
	$(PY) examples/train_digit_scenes.py --method dla --output demo-dla

bench: install
	$(PY) -m pytest benchmarks --rows all --results benchmarks/results
	$(PY) benchmarks/report.py

lint: $(VENV)/.packages
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)
	$(PY) -m mypy

format: $(VENV)/.packages
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

gpu:
	PYTHON=$(PYTHON) tools/gpu.sh $(RESULTS)

gpu-compile:
	PYTHON=$(PYTHON) tools/gpu.sh $(RESULTS) compile

clean:
	rm -rf build $(VENV) demo demo-vac demo-i2c demo-hnc demo-dla camkernels/*.so *.egg-info
