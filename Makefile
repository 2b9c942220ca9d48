# Each target does its own set-up: a virtual environment in .venv with the package and pinned dependencies.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo demo-full test test-slow reliability test-slim test-docker bench lint lint-docker format clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "ssod needs Python >= 3.10")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,export,fast,openvino,rtx,tb]'
	touch $(READY)

demo: $(READY)  ## train on the drawn demo set: under 4 minutes on 2 cores
	$(BIN)/ssod train cfg=demo.yaml

demo-full: $(READY)  ## supervised against mean_teacher, 3 seeds: 20-30 minutes on 2 cores
	$(BIN)/python tests/bench/study.py tests/bench/grids/demo.yaml arms=supervised,mean_teacher jobs=2 out=runs/demo-full

test: $(READY) lint  ## all fast tests, on up to four cores
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

reliability: $(READY)  ## every fault of docs/reliability.md, injected; writes the page
	$(BIN)/python tests/reliability_page.py

test-slim: $(READY)  ## exported models in an environment without torch, by the commands of docker/Dockerfile.slim
	$(BIN)/python -m pytest -m slow tests/deploy/test_slim.py

test-docker: $(READY)  ## the commands of docker/Dockerfile without Docker: gigabytes of packages
	$(BIN)/python -m pytest -m slow tests/test_docker.py

bench: $(READY)  ## speed against peers, one table of ratios, kept in runs/bench; an idle machine of 16 GB, for hours
	$(BIN)/python tests/bench/bench.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lint-docker:  ## checkov (Apache-2.0) in an environment of its own; no HEALTHCHECK: the images are commands, not services
	$(PYTHON) -m venv build/lint-docker
	build/lint-docker/bin/python -m pip install --quiet checkov==3.3.30
	build/lint-docker/bin/checkov --framework dockerfile --directory docker --compact --quiet --skip-download --skip-check CKV_DOCKER_2

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
