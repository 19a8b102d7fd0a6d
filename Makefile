# make run: start the dashboard. make test: all checks and tests. Python >= 3.11 is all that must be there.
PYTHON ?= python3
PORT ?= 7860
HOST ?= 127.0.0.1
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Modules are compiled when they are first imported: most of what the packages hold never is.
PIP_INSTALL := $(BIN)/pip install -q --no-compile
# Where it is set every process compiles all of our modules anew.
unexport PYTHONDONTWRITEBYTECODE
# Seconds of the clock, also for the makes and the tests that this one starts.
export MAQUETTE_TESTS_BEGAN := $(or $(MAQUETTE_TESTS_BEGAN),$(shell date +%s))

.PHONY: run test tests everything ready chromium check format killloop clean

run: .venv/requirements
	HOST=$(HOST) PORT=$(PORT) $(BIN)/python app.py

# What takes long comes last, and begins only within the first minutes, those of installing counted: all stays within
# a quarter of an hour.
test: ready
	$(MAKE) --jobs 2 check tests OPTIONS="--minutes 9 --durations 40"

# All of it, on every family of models.
everything: ready
	$(MAKE) --jobs 2 check tests OPTIONS=--everything

# Packages of Python and of the system come at the same time.
ready:
	$(MAKE) --jobs 2 .venv/requirements-test chromium

tests:
	REQUIRE_CHROMIUM=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(OPTIONS)

check: .venv/requirements-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy engine ui app.py
	$(BIN)/lint-imports

format: .venv/requirements-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

killloop: .venv/requirements-test
	$(BIN)/python tests/killloop.py --runs 200

# torch by its exact version first: a range would let pip fetch a newer build, with gigabytes of CUDA on Linux.
.venv/requirements: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP_INSTALL) torch==2.13.0 || true
	$(PIP_INSTALL) -r requirements.txt
	touch $@

.venv/requirements-test: .venv/requirements requirements-test.txt
	$(PIP_INSTALL) -r requirements-test.txt
	touch $@

# Chromium for the browser tests: Debian's package as root, else the one that Playwright brings.
chromium:
	@command -v chromium chromium-browser google-chrome >/dev/null || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && apt-get install -y -qq chromium fonts-noto-cjk; \
	else \
		$(MAKE) .venv/requirements-test && $(BIN)/playwright install chromium; \
	fi

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
