# make demo    the main job on real input: real projects' own suites, every test in a sandbox of its own
# make test    all that CI checks: linters, and the suite
# make quick   linters, and the tests that are done within a minute
# make bench   the figures that README.md quotes

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

# For the microVM backend; the kernel and the rest are fetched by 'isolation microvm setup', as any user.
QEMU = qemu-system-$(shell uname -m)
PACKAGE = $(if $(filter x86_64,$(shell uname -m)),qemu-system-x86,qemu-system-arm)

.PHONY: demo test quick lint bench clean machine

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --upgrade pip
	$(VENV)/bin/pip install --quiet -e '.[dev]'
	touch $@

machine: $(VENV)/installed
	@command -v $(QEMU) >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(PACKAGE); } || \
	    { echo "the microVM backend needs QEMU: sudo apt-get install --no-install-recommends $(PACKAGE)"; exit 1; }
	$(VENV)/bin/isolation microvm setup

demo: machine
	$(RUN) examples/demo.py

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check --quiet .
	$(VENV)/bin/mypy

# What linters say does not depend on who asks: of two users that run all of this (.ci/run), one has them.
test: $(if $(filter user,$(ISOLATION_TESTS)),,lint) machine
	$(RUN) tests/suite.py $(TESTS)

quick: lint
	$(RUN) tests/suite.py --quick

bench: $(VENV)/installed
	$(RUN) benchmarks/per_test.py
	$(RUN) benchmarks/fixtures.py
	$(RUN) benchmarks/parallel.py
	$(RUN) benchmarks/launch.py
	$(RUN) benchmarks/kernel.py
	$(RUN) benchmarks/microvm.py
	$(RUN) benchmarks/suites.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
