# Two commands do everything on a fresh machine: `make demo` and `make test`.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ASCEND := .venv-ascend
WORKERS ?= 2

.PHONY: demo test test-cuda test-ascend full lint bench clean

demo: $(VENV)/installed
	bash ci/demo.sh $(BIN)

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n $(WORKERS) -m "not full and not browser"

test-cuda: $(VENV)/installed-test
	bash ci/cuda.sh $(BIN)

test-ascend: $(ASCEND)/installed
	bash ci/ascend.sh $(ASCEND)/bin

full: $(VENV)/installed-test $(ASCEND)/installed
	$(BIN)/python -m pytest -n $(WORKERS) -m "not browser"
	bash ci/kernels.sh $(BIN) full
	bash ci/ascend.sh $(ASCEND)/bin
	bash ci/apart.sh $(BIN) $(ASCEND)/bin

lint: $(VENV)/installed-test
	bash ci/lint.sh $(BIN)

bench: $(VENV)/installed-test
	$(BIN)/python benchmarks/against_transformers.py

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[tokenizer,report,fuzz]'
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $@

# Apart from the other: where torch_npu is installed and CANN is not, `import torch` fails unless it is told not to look.
$(ASCEND)/installed: pyproject.toml constraints.txt
	test -x $(ASCEND)/bin/python || $(PYTHON) -m venv $(ASCEND)
	$(ASCEND)/bin/python -m pip install -q -c constraints.txt torch
	$(ASCEND)/bin/python -m pip install -q -c constraints.txt --no-deps torch_npu
	$(ASCEND)/bin/python -m pip install -q -c constraints.txt -e '.[tokenizer]' pytest pytest-timeout
	touch $@

clean:
	rm -rf $(VENV) $(ASCEND) build dist out *.egg-info
