# make demo    the main job on real input: real projects' own suites, every test in a sandbox of its own
# make test    all that CI checks
# make bench   the figures that README.md quotes

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo test lint bench clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(VENV)/bin/isolation doctor
	cd examples/leaky && $(CURDIR)/$(VENV)/bin/pytest -q --isolation
	cd examples/hostile && $(CURDIR)/$(VENV)/bin/pytest -q --isolation --tb=line || true
	$(RUN) benchmarks/suites.py itsdangerous pluggy

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

test: lint
	$(RUN) -m pytest tests

bench: $(VENV)/installed
	$(RUN) benchmarks/per_test.py
	$(RUN) benchmarks/launch.py
	$(RUN) benchmarks/suites.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
