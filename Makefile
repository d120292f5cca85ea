# `make demo` runs the whole experiment on embedded data; `make test` proves the installation. Both install first, and
# `make test` adds what tests alone need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export IMPACTX_DATA ?= $(if $(wildcard ../shared/data),../shared/data,data)

.PHONY: demo test lint unit reference cluster-tests chaos test-servers audit install clean \
  cluster-secrets cluster-image cluster-up cluster-demo cluster-down cluster-purge cluster-check

demo: $(VENV)/.installed
	$(BIN)/python jobs/full_grid.py --preset demo

# Fast unit tests, a sample of the reference tests, and real Ray.
test: $(VENV)/.installed-tests lint
	$(BIN)/python -m pytest tests -m "not full and not slow" --ignore tests/servers

lint: $(VENV)/.installed-tests
	$(BIN)/ruff check platform jobs tests docker
	$(BIN)/mypy

unit: $(VENV)/.installed-tests
	$(BIN)/python -m pytest tests/unit

# The whole cross of the comparisons with shap and the slow twins.
reference: $(VENV)/.installed-tests
	$(BIN)/python -m pytest tests/reference -m "full or not full" --timeout 3600

cluster-tests: $(VENV)/.installed-tests
	$(BIN)/python -m pytest tests/cluster -m "slow or not slow" --timeout 3600

# Nodes, processes, drivers and disks fail under real jobs, and what else takes long on a cluster.
chaos: $(VENV)/.installed-tests
	$(BIN)/python -m pytest tests/cluster -m slow --timeout 3600

# Against real servers on loopback: MLflow, S3, PostgreSQL, and Ray nodes with token authentication.
test-servers: $(VENV)/.installed-tests
	$(BIN)/python -m pytest tests/servers -m "not slow"

install: $(VENV)/.installed

# constraints.txt pins every package; the stamps are newer than both files, so a change installs again.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cluster,explain]'
	touch $@

# quantus comes by itself: its opencv-python would write over opencv-python-headless, which does for it as well.
$(VENV)/.installed-tests: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cluster,explain,server,test]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps quantus
	touch $@

# Known vulnerabilities of every pinned package; asks the package index about each (needs it, takes a minute).
audit: .venv-audit/.installed
	.venv-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

.venv-audit/.installed:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet pip-audit==2.10.1
	touch $@

# A cluster in containers on this machine: docs/cluster.md. WORKERS, WORKER_CPUS, WORKER_MEMORY, GPU=1, DEVICE=cpu, ...
DOCKER ?= docker
COMPOSE ?= $(DOCKER) compose
DEVICE ?= gpu
export SECRETS ?= $(CURDIR)/docker/secrets
export IMAGE ?= impactx:latest
export WORKERS ?= $(if $(GPU),1,2)
export WORKER_CPUS ?= $(shell n=$$(( $$(getconf _NPROCESSORS_ONLN) / $(WORKERS) )); echo $$(( n > 0 ? n : 1 )))
CLUSTER := $(COMPOSE) --file docker/compose.yaml $(if $(GPU),--file docker/compose.gpu.yaml)

cluster-secrets:
	$(PYTHON) docker/make_secrets.py $(SECRETS)

cluster-image:
	DOCKER_BUILDKIT=1 $(DOCKER) build --file docker/Dockerfile --tag $(IMAGE) \
	  --build-arg DEVICE=$(DEVICE) --build-arg TORCH_INDEX=$(TORCH_INDEX) $(if $(BASE),--build-arg BASE=$(BASE)) \
	  --build-arg REVISION=$$(git describe --always --dirty=+changes 2>/dev/null) .

cluster-up: cluster-secrets cluster-image
	$(CLUSTER) up --detach --no-build --wait --wait-timeout 600
	@echo "dashboard: http://127.0.0.1:$(or $(RAY_PORT),8265)   token: $(SECRETS)/ray_token"
	@echo "MLflow:    http://127.0.0.1:$(or $(MLFLOW_PORT),5000)"

cluster-demo:
	$(CLUSTER) exec -T head ray job submit -- python jobs/full_grid.py --preset demo

# Results stay in the volumes; cluster-purge removes these, the image, and the secrets that cluster-secrets wrote.
cluster-down:
	$(CLUSTER) down

cluster-purge:
	$(CLUSTER) down --volumes
	-$(DOCKER) image rm $(IMAGE)
	$(PYTHON) docker/make_secrets.py --remove $(SECRETS)

# Builds and starts all of it for real, loses a worker half-way, reads the results back, takes it down: 10 to 15 minutes.
cluster-check: $(VENV)/.installed-tests
	$(PYTHON) docker/check_cluster.py

clean:
	rm -rf $(VENV) results
