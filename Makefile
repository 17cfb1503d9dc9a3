# What a contributor types. Each target brings what it needs: the virtual environment, and with it the brokers.

BACKEND ?= sqlite
BROKERS ?= rabbitmq,kafka,activemq,artemis
PYTEST_ARGS ?=
SEED ?=
MINUTES ?= 10
FUZZ ?= 100000
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

IN := .venv/bin/python
BROKER := $(patsubst activemq-virtual,activemq,$(filter-out sqlite,$(BACKEND)))

.DEFAULT_GOAL := help
.PHONY: help venv install-brokers brokers brokers-down demo check test test-all test-stress test-clusters test-unit test-pythons test-djangos fuzz bench chaos soak docs

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

venv: .venv/installed ## make .venv with the project and all it needs

.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; PYTHON=/path/to/it names one" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		$(PYTHON) -c 'from brokers.install import apt; apt(["python3-venv"])'
	test -x $(IN) || $(PYTHON) -m venv .venv
	$(IN) -m pip install --quiet --disable-pip-version-check --upgrade --constraint constraints.txt pip
	$(IN) -m pip install --quiet --constraint constraints.txt --editable . --group dev
	@touch $@

install-brokers: ## install what the brokers in BROKERS lack (apt, Maven)
	$(PYTHON) -m brokers install "$(BROKERS)"

brokers: ## bring up the brokers in BROKERS; writes .brokers/pubsub.<broker>.toml
	$(PYTHON) -m brokers up "$(BROKERS)"

brokers-down: ## stop those that `make brokers` started
	$(PYTHON) -m brokers down "$(BROKERS)"

demo: venv ## the social example on BACKEND (sqlite, rabbitmq, kafka, activemq, activemq-virtual, artemis)
	$(IN) -m brokers run "$(BROKER)" -- \
		$(if $(BROKER),env PUBSUB_CONFIG=$(CURDIR)/.brokers/pubsub.$(BACKEND).toml) $(IN) examples/social/run.py

check: venv ## format, lint, types
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

test: test-all test-stress ## every test, then the suite in parallel; a broker in BROKERS that does not start fails the run

test-all: venv ## every test but those of clusters, on every broker in BROKERS
	BROKERS="$(BROKERS)" $(IN) -m brokers run "$(BROKERS)" -- $(IN) -m pytest -m "not cluster" $(PYTEST_ARGS)

test-stress: venv ## the conformance suite on each backend, three cases at once
	BROKERS="$(BROKERS)" $(IN) -m brokers run "$(BROKERS)" -- $(IN) -m pytest -m conformance -n 3 $(PYTEST_ARGS)

test-clusters: venv ## three RabbitMQ nodes, three Kafka brokers, a Classic pair: nodes come and go, or do not reach each other (as root)
	AWAY=60 BROKERS="$(BROKERS)" $(IN) -m pytest tests/chaos/test_clusters.py $(PYTEST_ARGS)

test-unit: venv ## the tests that need no broker
	$(IN) -m pytest tests/unit $(PYTEST_ARGS)

test-pythons: ## the tests that need no broker, on Python 3.12 and 3.13
	.ci/pythons 3.12 3.13

test-djangos: ## the Django integration's cases on Django 4.2 and 6.0
	.ci/djangos 4.2:3.11 6.0:3.12

fuzz: venv ## hostile input: FUZZ inputs for each of its tests
	FUZZ=$(FUZZ) $(IN) -m pytest tests/unit/test_fuzz.py tests/unit/test_filters.py $(PYTEST_ARGS)

bench: venv ## each backend beside its raw driver
	$(IN) -m brokers run "$(BROKERS)" -- $(IN) -m benchmarks

chaos: venv ## the long chaos runs; SEED=n repeats one
	$(IN) -m brokers run "$(BROKERS)" -- $(IN) -m tests.chaos $(if $(SEED),--seed $(SEED))

soak: venv ## a steady rate on BACKEND for MINUTES
	$(IN) -m brokers run "$(BROKER)" -- \
		$(IN) -m tests.chaos.soak --backend $(BACKEND) --minutes $(MINUTES)

docs: venv ## build the documentation into site/
	$(IN) -m pip install --quiet --constraint constraints.txt --group docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict
