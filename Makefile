# The habits. Each target does its own set-up; the first run downloads, later ones start in seconds.
SCENARIO ?= scenarios/quickstart.toml
PY := .venv/bin/python

.PHONY: sweep test lint fuzz bench bench-awc bench-links bench-link-model bench-policies bench-sim bench-runtimes bench-wire bench-pair bench-drafter bench-gpu report image doctor clean

sweep: .venv/ready
	$(PY) -m dsdlab sweep $(SCENARIO)

test: .venv/ready-dev lint
	scripts/test-deps.sh
	scripts/docker.sh with scripts/tests.sh

lint: .venv/ready-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench-awc: .venv/ready-dev
	$(PY) -m bench.awc

fuzz: .venv/ready
	$(PY) -m dsdlab fuzz --runs 10000

bench: .venv/ready
	$(PY) -m bench.engine

bench-links: .venv/ready
	$(PY) -m bench.links

bench-sim: .venv/ready-dev
	$(PY) -m bench.sim

bench-policies: .venv/ready
	$(PY) -m bench.policies

bench-link-model: .venv/ready
	$(PY) -m bench.link_model

bench-runtimes: .venv/ready
	scripts/docker.sh with $(PY) -m bench.runtimes

bench-wire: .venv/ready
	$(PY) -m bench.wire

bench-pair: .venv/ready
	$(PY) -m bench.pair

bench-drafter: .venv/ready
	$(PY) -m bench.drafter $(PROMPTS)

bench-gpu: .venv/ready
	$(PY) -m bench.gpu_engine --out results/bench/gpu-engine.json

report: .venv/ready
	for folder in results/*/rows.jsonl; do $(PY) -m dsdlab report "$$(dirname "$$folder")"; done

image: .venv/ready
	scripts/docker.sh with $(PY) -m testbed.image

doctor: .venv/ready
	$(PY) -m dsdlab doctor

clean:
	rm -rf .venv build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/ready: pyproject.toml scripts/setup.sh
	scripts/setup.sh
	@touch $@

.venv/ready-dev: .venv/ready
	scripts/setup.sh dev
	@touch $@
