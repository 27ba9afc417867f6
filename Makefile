# Everything a developer needs; `make help` lists it. On a fresh Debian machine `make run` and `make test` install what they need.

# The system's own where it is new enough: one that lies in somebody's home is nobody else's, and some tests run as another user.
PYTHON ?= $(shell /usr/bin/python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo /usr/bin/python3 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
# The folders of tests/unit that start no process and take seconds.
CHECK_TESTS := tests/unit/test_docs.py tests/unit/test_layers.py tests/unit/test_names.py tests/unit/diagnosis tests/unit/limits tests/unit/batch
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Without .pyc files everything that is imported is compiled at each start: two to three times slower.
unexport PYTHONDONTWRITEBYTECODE
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

.DEFAULT_GOAL := help

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z][a-z0-9-]*:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

.PHONY: system
system: ## Install the system packages that are missing (Debian, Ubuntu)
	@missing=""; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing="$$missing python3-venv"; \
	command -v $(PYTHON) >/dev/null || missing="$$missing python3"; \
	command -v setpriv >/dev/null || missing="$$missing util-linux"; \
	command -v mount >/dev/null || missing="$$missing mount"; \
	command -v bwrap >/dev/null || missing="$$missing bubblewrap"; \
	ldconfig -p 2>/dev/null | grep -q 'libstdc++\.so\.6' || missing="$$missing libstdc++6"; \
	if [ -n "$$missing" ]; then \
		$(SUDO) apt-get update -q && DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -q --no-install-recommends $$missing; \
	fi

# Debian testing has no r-cran-irkernel at times: tests of its bed are left out there, and counted.
.PHONY: system-tests
system-tests: | system ## Install the system packages of the tests alone: R's kernel and Slurm, if apt has them
	@[ -x /usr/sbin/slurmctld ] || { \
		$(SUDO) apt-get update -q && { \
			DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -q --no-install-recommends slurm-wlm munge \
			|| ! apt-cache show slurm-wlm >/dev/null 2>&1; \
		}; \
	}
	@[ -e /usr/share/jupyter/kernels/ir ] || { \
		$(SUDO) apt-get update -q && { \
			DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -q --no-install-recommends r-cran-irkernel \
			|| ! apt-cache show r-cran-irkernel >/dev/null 2>&1; \
		}; \
	}

.PHONY: browser
browser: ## Install the browser that the HTML report is tested in, where it is missing (Debian; some 300 MB)
	@command -v chromium >/dev/null || command -v chromium-headless-shell >/dev/null || { \
		$(SUDO) apt-get update -q && DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -q --no-install-recommends chromium; \
	}

$(VENV)/pyvenv.cfg: | system
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "safe-exec needs Python 3.11 or newer; choose one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run-installed: pyproject.toml $(VENV)/pyvenv.cfg
	$(BIN)/pip install -q -e '.[kernel]' numpy
	@touch $@

$(VENV)/.dev-installed: pyproject.toml $(VENV)/pyvenv.cfg | system-tests
	$(BIN)/pip install -q -e '.[dev]'
	$(BIN)/python -m bash_kernel.install --sys-prefix
	XDG_DATA_HOME=$(VENV)/share $(BIN)/deno jupyter --install --force 2>/dev/null
	@touch $@ $(VENV)/.run-installed

.PHONY: install
install: $(VENV)/.dev-installed ## Install safe-exec and what its tests need into .venv

.PHONY: run
run: $(VENV)/.run-installed ## Run the main job on the notebooks of examples/ and show what it says
	@for notebook in examples/*-*.ipynb; do \
		case $$notebook in *.out.ipynb|*.repro.ipynb) continue;; esac; \
		echo; echo "$$ safe-exec run $$notebook"; \
		$(BIN)/safe-exec run $$notebook 2>/dev/null; code=$$?; \
		echo "exit code $$code"; \
		if [ $$code = 7 ]; then exit $$code; fi; \
	done

.PHONY: beds
beds: $(VENV)/.dev-installed ## List the test beds that this machine has, and how to get the others
	@$(BIN)/python -m tests.beds

.PHONY: announce
announce:
	@echo "make test takes 15 to 30 minutes on two processors; make check takes less than three."
	@echo "It installs into .venv what the tests need, and with apt: bubblewrap, R's kernel, chromium (300 MB)."

.PHONY: check
check: $(VENV)/.dev-installed ## Check a change in under three minutes: style, types, names, documentation, pure logic
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	$(BIN)/pytest -n $(JOBS) -q $(CHECK_TESTS)

.PHONY: test
test: announce $(VENV)/.dev-installed browser beds ## Run all tests: unit, real kernels, cases, parity (15 to 30 minutes)
	$(BIN)/pytest -n $(JOBS) --dist worksteal -q -m 'not hostile'

.PHONY: test-hostile
test-hostile: $(VENV)/.dev-installed ## Run notebooks that try to get out, inside walls (some minutes)
	$(BIN)/pytest -n $(JOBS) --dist worksteal -q tests/hostile

.PHONY: test-fast
test-fast: $(VENV)/.dev-installed ## Run the tests that start no kernel (seconds)
	$(BIN)/pytest -n $(JOBS) -q tests/unit

.PHONY: test-cases
test-cases: $(VENV)/.dev-installed ## Run all cases, in every place, each with the search for its culprits
	SAFE_EXEC_CASES_MINUTES=inf SAFE_EXEC_CASES_PLACES=all $(BIN)/pytest -n $(JOBS) --dist worksteal -q tests/cases

.PHONY: test-answers
test-answers: $(VENV)/.dev-installed ## Run the cases without the search for culprits, and parity: what differs between versions of Python
	$(BIN)/pytest -n $(JOBS) --dist worksteal -q tests/cases tests/parity -k 'not test_culprits'

.PHONY: cases-table
cases-table: $(VENV)/.dev-installed ## Measure that search one case at a time, and write the table in docs/culprit-search.md
	SAFE_EXEC_CASES_MINUTES=inf $(BIN)/pytest -q tests/cases -k test_culprits --culprit-table docs/culprit-search.md

.PHONY: test-parity
test-parity: $(VENV)/.dev-installed ## Compare the outputs of notebooks that pass with those of nbclient (a minute or two)
	$(BIN)/pytest -n $(JOBS) --dist worksteal -q tests/parity

.PHONY: versions-table
versions-table: $(VENV)/.dev-installed ## Run kernels of the other Pythons that are here, and write the table in docs/platforms.md
	$(BIN)/pytest -q tests/integration/test_python_versions.py --versions-table docs/platforms.md

.PHONY: system-release
system-release: | system ## Install what makes a root file system of another release (Debian)
	@missing=""; \
	command -v debootstrap >/dev/null || [ -x /usr/sbin/debootstrap ] || missing="$$missing debootstrap"; \
	command -v git >/dev/null || missing="$$missing git"; \
	if [ -n "$$missing" ]; then \
		$(SUDO) apt-get update -q && DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -q --no-install-recommends $$missing; \
	fi

RELEASE ?= trixie
TARGETS ?= run test
MINUTES ?= 60
.PHONY: test-release
test-release: system-release ## Run the README's two commands on a fresh Debian of RELEASE=trixie, bookworm or testing; TARGETS="run test-fast" selects others
	$(SUDO) env "PATH=$$PATH:/usr/sbin:/sbin" $(PYTHON) -m tests.releases --minutes $(MINUTES) $(RELEASE) $(TARGETS)

# A share of it for every day. Cases whose answer depends on the version of Python are always among those that are drawn.
.PHONY: test-other-release
test-other-release: export SAFE_EXEC_ANSWERS_MINUTES ?= 2
test-other-release: ## Run examples, fast tests, a part of the cases and parity on a fresh Debian 13, with Python 3.13 (ten minutes)
	$(MAKE) test-release RELEASE=trixie TARGETS="run test-fast test-answers" MINUTES=20

.PHONY: system-vm
system-vm: | system ## Install what it takes to boot a Linux of its own (Debian, amd64)
	@missing=""; \
	command -v qemu-system-x86_64 >/dev/null || missing="$$missing qemu-system-x86"; \
	command -v debootstrap >/dev/null || missing="$$missing debootstrap"; \
	command -v mkfs.ext4 >/dev/null || [ -x /usr/sbin/mkfs.ext4 ] || missing="$$missing e2fsprogs"; \
	command -v depmod >/dev/null || [ -x /usr/sbin/depmod ] || missing="$$missing kmod"; \
	command -v git >/dev/null || missing="$$missing git"; \
	if [ -n "$$missing" ] || ! apt-cache show linux-image-amd64 >/dev/null 2>&1; then \
		$(SUDO) apt-get update -q && DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -q --no-install-recommends $$missing; \
	fi

.PHONY: test-cgroup2
test-cgroup2: $(VENV)/.dev-installed system-vm ## Boot a Linux with control groups v2 and systemd, and run the tests for both (some minutes)
	$(SUDO) env "PATH=$$PATH:/usr/sbin:/sbin" $(BIN)/python -m tests.vm -- -q -n 3 --dist worksteal tests/integration/test_unified.py tests/integration/test_v2_notebooks.py

.PHONY: schema
schema: $(VENV)/.dev-installed ## Make the JSON Schemas of verdict and summary from the types
	$(BIN)/python -m safe_exec.reports.schemas

.PHONY: lint
lint: $(VENV)/.dev-installed ## Check style (ruff) and the layers of imports (import-linter)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

.PHONY: types
types: $(VENV)/.dev-installed ## Check types (mypy, strict)
	$(BIN)/mypy

.PHONY: format
format: $(VENV)/.dev-installed ## Format the code
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format -q .

# A place of its own, with nothing but what is compared: beside JupyterLab's packages nbformat alone takes most of a second to import.
BENCH := .venv-bench
$(BENCH)/.installed: pyproject.toml | system
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/pip install -q -e '.[kernel,bench]'
	@touch $@

.PHONY: bench
bench: $(BENCH)/.installed ## Measure everything beside its peers, and write the table and the picture in docs (15 minutes)
	$(BENCH)/bin/python -m benchmarks.bench --table --json docs/performance.json
	$(BENCH)/bin/python -m benchmarks.walls
	$(BENCH)/bin/python -m benchmarks.disk

.PHONY: bench-quick
bench-quick: $(BENCH)/.installed ## The same in a round or two each; writes nothing
	$(BENCH)/bin/python -m benchmarks.bench --quick

.PHONY: bench-check
bench-check: $(BENCH)/.installed ## Compare paired ratios with the recorded ones; fails where one has become worse beyond its noise
	$(BENCH)/bin/python -m benchmarks.check

.PHONY: pictures
pictures: $(VENV)/.dev-installed browser ## Make the pictures of the README from real runs, in headless chromium
	$(BIN)/python -m tools.pictures docs

.PHONY: clean
clean: ## Remove .venv, caches and what runs of examples/ wrote
	rm -rf $(VENV) $(BENCH) .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build
	rm -f examples/*.out.ipynb examples/*.verdict.json examples/*.repro.ipynb
	find . -name __pycache__ -prune -exec rm -rf {} +
