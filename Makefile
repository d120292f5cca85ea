# `make demo` runs the whole experiment on embedded data; `make test` proves the installation. Both install first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export IMPACTX_DATA ?= $(if $(wildcard ../shared/data),../shared/data,data)

.PHONY: demo test lint unit reference cluster-tests chaos test-servers install clean

demo: $(VENV)/.installed
	$(BIN)/python jobs/full_grid.py --preset demo

# Fast unit tests, a sample of the reference tests, and real Ray.
test: $(VENV)/.installed lint
	$(BIN)/python -m pytest tests -m "not full and not slow" --ignore tests/servers

lint: $(VENV)/.installed
	$(BIN)/ruff check platform jobs tests

unit: $(VENV)/.installed
	$(BIN)/python -m pytest tests/unit

# The whole cross of the comparisons with shap and the slow twins.
reference: $(VENV)/.installed
	$(BIN)/python -m pytest tests/reference -m "full or not full" --timeout 3600

cluster-tests: $(VENV)/.installed
	$(BIN)/python -m pytest tests/cluster -m "slow or not slow" --timeout 3600

# Nodes, processes, drivers and disks fail under real jobs.
chaos: $(VENV)/.installed
	$(BIN)/python -m pytest tests/cluster/test_faults.py tests/cluster/test_submit.py -m "slow or not slow" --timeout 3600

# Against real servers on loopback: MLflow, S3.
test-servers: $(VENV)/.installed
	$(BIN)/python -m pytest tests/servers -m "not slow"

install: $(VENV)/.installed

# constraints.txt pins every package; the stamp is newer than both files, so a change installs again.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cluster,explain,test]'
	touch $@

clean:
	rm -rf $(VENV) results
