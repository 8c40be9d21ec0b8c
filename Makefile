# make run     execute the quickstart and write it to build/project.html
# make test    run the fast tests
# `make help` lists all commands. None of them needs an activated environment.

PYTHON ?= python3
EXPERIMENT ?= iris_classification
COMMITTED = $(shell git ls-files '*.ipynb' ':!benchmarks')

ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
NULL_DEVICE := nul
else
BIN := .venv/bin
NULL_DEVICE := /dev/null
endif

# These settings are text. Make does not expand them, and recipes read them from the environment, so the shell does not
# either. PYTHON is a command, and BIN, UV and the paths below are for tests.
override EXPERIMENT := $(value EXPERIMENT)
override METRIC := $(value METRIC)
override NOTEBOOKS := $(value NOTEBOOKS)
override ONLY := $(value ONLY)
override PORT := $(value PORT)
override TURN := $(value TURN)
override UPGRADE := $(value UPGRADE)

# Guide 06 needs Spark and Java, which are not part of the basic environment.
OUT_OF_REACH = $(shell (command -v java && $(BIN)/python -c "import pyspark") >/dev/null 2>&1 || echo guides/06_scale_out.ipynb)
TO_REACH_IT = It needs Java 17 or later (on Debian: apt-get install openjdk-17-jre-headless) and: make scale

INSTALLED := .venv/installed.txt
DEVELOPMENT := .venv/development.txt
SCALE := .venv/scale.txt
UV := $(BIN)/uv

# Let Python write its compiled files, which halves the time of every later start.
unexport PYTHONDONTWRITEBYTECODE
# Ignore an activated environment of another project.
unexport VIRTUAL_ENV
unexport PYTHONPATH

# pip and uv read no settings file. From the environment they take only how to reach a package index and where to cache
# downloads, which cannot change what is installed: the hashes verify that. Any other variable could add a package or
# disable a check.
PASSED_ON := PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_NO_INDEX PIP_FIND_LINKS PIP_KEYRING_PROVIDER PIP_TRUSTED_HOST PIP_CERT \
	PIP_CLIENT_CERT PIP_PROXY PIP_TIMEOUT PIP_DEFAULT_TIMEOUT PIP_RETRIES PIP_CACHE_DIR PIP_NO_CACHE_DIR \
	UV_INDEX UV_DEFAULT_INDEX UV_INDEX_URL UV_EXTRA_INDEX_URL UV_INDEX_%_USERNAME UV_INDEX_%_PASSWORD UV_FIND_LINKS \
	UV_KEYRING_PROVIDER UV_INSECURE_HOST UV_SYSTEM_CERTS UV_NATIVE_TLS UV_OFFLINE UV_HTTP_TIMEOUT \
	UV_HTTP_CONNECT_TIMEOUT UV_REQUEST_TIMEOUT UV_HTTP_RETRIES UV_CACHE_DIR UV_NO_CACHE
unexport $(filter-out $(PASSED_ON),$(filter PIP_% UV_%,$(.VARIABLES)))
export PIP_CONFIG_FILE := $(NULL_DEVICE)

.PHONY: run lab ui guides report test site scale clean help
.PHONY: notebooks lint test-all test-nightly coverage lock upgrade audit browser postgresql screenshots bench reliability reproduce
.DELETE_ON_ERROR:

# One process more than there are cores, because tests also wait: for servers, kernels and locks.
PYTEST = $(BIN)/python -m pytest --numprocesses $(shell $(BIN)/python -c "import os; print(os.cpu_count() + 1)") \
	--dist loadfile --no-loadscope-reorder

# The parts of `make test-nightly`. `.ci/run` runs one of them, in turn.
NIGHTLY_1 = tests/deploy/test_containers.py
NIGHTLY_2 = tests/deploy/test_deploy_guides.py
NIGHTLY_3 = tests/deploy/test_deploy.py tests/deploy/test_deploy_failures.py tests/deploy/test_deploy_notebooks.py \
	tests/deploy/test_deploy_users.py
NIGHTLY_4 = tests/lifecycle/test_road.py tests/notebooks/test_keep_pins.py tests/lifecycle/test_renew.py \
	tests/notebooks/test_places.py tests/tools/test_lab.py tests/tools/test_raised_pins.py
NIGHTLY_5 = tests/lifecycle/test_wheel.py tests/lifecycle/test_batch.py tests/notebooks/test_scale.py \
	tests/lifecycle/test_drift_rates.py tests/lifecycle/test_server_load.py tests/tools/test_benchmarks.py
NIGHTLY_6 = tests/notebooks/test_own_data.py tests/notebooks/test_monitor.py tests/notebooks/test_release.py \
	tests/notebooks/test_refusals.py tests/notebooks/test_champion.py
NIGHTLY_7 = tests/notebooks/test_compare_models.py tests/notebooks/test_heart_disease.py tests/notebooks/test_search.py \
	tests/notebooks/test_guides_interface.py tests/notebooks/test_interface.py tests/tools/test_entry_points.py \
	tests/tools/test_page.py tests/tools/test_site.py
NIGHTLY_8 = tests/deploy/test_deploy_s3.py tests/deploy/test_deploy_aliases.py tests/deploy/test_deploy_limits.py \
	tests/deploy/test_deploy_metrics.py tests/deploy/test_upgrades.py tests/deploy/test_kubernetes.py tests/tools/test_release_action.py
NIGHTLY = $(NIGHTLY_1) $(NIGHTLY_2) $(NIGHTLY_3) $(NIGHTLY_4) $(NIGHTLY_5) $(NIGHTLY_6) $(NIGHTLY_7) $(NIGHTLY_8)
TESTS = project.ipynb $(filter-out $(NIGHTLY),$(foreach folder,notebooks lifecycle tools,$(wildcard tests/$(folder)/test_*.py)))

##@ Use the project

run: $(INSTALLED) ## execute project.ipynb into build/project.html
	@$(BIN)/python tools/run.py --shutdown immediate project.ipynb || { status=$$?; \
		[ $$status -eq 130 ] || $(BIN)/python -m mlflow_lifecycle doctor --quiet; exit $$status; }

# Use the kernel of this environment, even if another kernel on the machine has the same name, "python3".
lab: export JUPYTER_PREFER_ENV_PATH = 1
lab: export JUPYTER_PATH =
lab: export PORT := $(PORT)
lab: $(DEVELOPMENT) ## open project.ipynb in JupyterLab (PORT=8889 for another port)
	$(BIN)/python -m jupyterlab --allow-root --KernelManager.transport_encryption=auto $(if $(PORT),--port "$$PORT") project.ipynb

ui: export PORT := $(PORT)
ui: $(INSTALLED) ## start the MLflow interface on the quickstart's store (PORT=5001 for another port)
	$(BIN)/python -m mlflow_lifecycle ui $(if $(PORT),--port "$$PORT")

guides: $(INSTALLED) ## execute all guides into build/, on the quickstart's store
	@$(if $(OUT_OF_REACH),echo "Left out: $(OUT_OF_REACH). $(TO_REACH_IT)")
	$(BIN)/python tools/run.py $(filter-out $(OUT_OF_REACH),$(sort $(wildcard guides/*.ipynb)))

report: export EXPERIMENT := $(EXPERIMENT)
report: export METRIC := $(METRIC)
report: $(INSTALLED) ## write a report on the runs of an experiment to build/ (EXPERIMENT=name, METRIC=name)
	@$(BIN)/python -m mlflow_lifecycle report "$$EXPERIMENT" --metric "$$METRIC" --output "reports/$$EXPERIMENT"
	@$(BIN)/python tools/report_page.py "reports/$$EXPERIMENT" build/experiment_report.html
	@echo "As a page: build/experiment_report.html"

test: $(INSTALLED) ## run the fast tests, which need only the basic environment
	$(PYTEST) -m "not extended" $(TESTS)

site: $(DEVELOPMENT) ## build the website into build/site, without executing a notebook
	$(BIN)/python -m sphinx --quiet --fail-on-warning -c docs -d build/site-doctrees . build/site
	@echo "The site: build/site/index.html"

scale: $(SCALE) ## install what guide 06 needs except Java: Spark, PostgreSQL and its driver

clean: ## remove the environment and all build files, and keep the store (mlflow.db, mlruns)
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

##@ Work on the project

notebooks: export NOTEBOOKS := $(NOTEBOOKS)
notebooks: $(INSTALLED) ## regenerate the outputs of the committed notebooks in a new store (NOTEBOOKS=path for some)
	$(BIN)/python tools/notebooks.py $(if $(NOTEBOOKS),$$NOTEBOOKS,$(filter-out $(OUT_OF_REACH),$(COMMITTED)))
	@$(if $(NOTEBOOKS),,$(if $(OUT_OF_REACH),echo "Left out: $(OUT_OF_REACH). $(TO_REACH_IT)"))

lint: $(DEVELOPMENT) ## check code and notebooks with ruff, the direction of the imports, and the workflows with zizmor
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/ruff format --check --line-length 88 project.ipynb guides/*.ipynb
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/zizmor --offline --quiet .github

test-all: $(INSTALLED) ## run all tests but those of `make test-nightly`, and skip those whose dependencies are missing
	$(PYTEST) $(TESTS)

test-nightly: $(INSTALLED) ## run the longest tests: containers, guides on the shared server, wheels (TURN=1 for one part)
	$(PYTEST) $(if $(TURN),$(NIGHTLY_$(shell expr $(TURN) % 8 + 1)),$(NIGHTLY))

coverage: $(INSTALLED) ## measure the branch coverage of the library by its own tests
	rm -f .coverage*
	$(subst -m pytest,-m coverage run -m pytest,$(PYTEST)) $(filter-out $(NIGHTLY),$(wildcard tests/lifecycle/test_*.py))
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --show-missing --skip-covered

# The first lock has all packages. The others are constrained by a larger one, so that all have the same versions.
COMPILE = $(UV) pip compile --config-file uv.toml --no-sources --quiet --universal --python-version 3.11 \
	--fork-strategy fewest --custom-compile-command "make lock" $(if $(UPGRADE),--upgrade --exclude-newer "7 days")
lock: $(INSTALLED) ## compile the lock files from pyproject.toml (UPGRADE=1 to upgrade indirect dependencies, after seven days)
	$(COMPILE) --group scale --generate-hashes --output-file requirements-scale.txt
	$(COMPILE) --group development --generate-hashes --constraint requirements-scale.txt --output-file requirements-dev.txt
	$(COMPILE) --group server --generate-hashes --constraint requirements-scale.txt --output-file deploy/requirements.txt
	$(COMPILE) --group store --generate-hashes --output-file deploy/store.txt
	$(COMPILE) --group test --generate-hashes --constraint requirements-dev.txt --output-file requirements.txt
	$(COMPILE) --group model --constraint requirements.txt --output-file model_requirements.txt
	mkdir -p build
	for list in last_year pandas_3; do \
		names=$$(sed -n 's/==.*//p' guides/07_pins/$$list.in | paste -sd '|' -); \
		sed -E "/^($$names)==/d" model_requirements.txt > build/others.txt; \
		$(COMPILE) --no-annotate --no-header --group model --override guides/07_pins/$$list.in \
			--constraint build/others.txt --output-file guides/07_pins/$$list.txt || exit 1; \
	done
	cat guides/07_pins/*.in | $(COMPILE) --no-deps --no-annotate --no-header --generate-hashes \
		--output-file guides/07_pins/lock.txt -
	echo pyarrow | $(COMPILE) --no-deps --no-annotate --no-header --generate-hashes --constraint requirements.txt \
		--output-file mlflow_lifecycle/pyarrow.txt -

upgrade: $(INSTALLED) ## raise each pin that changes no output of the quickstart, compile the locks, and test
	mkdir -p build
	$(BIN)/python tools/upgrades.py --write > build/upgrades.md
	cat build/upgrades.md
	$(MAKE) lock UPGRADE=1
	$(MAKE) run
	$(MAKE) test

audit: export DATABASE := $(value DATABASE)
audit: $(INSTALLED) ## look for known vulnerabilities in the locks (DATABASE=all.zip for a downloaded copy of OSV)
	$(BIN)/python tools/audit.py requirements-scale.txt model_requirements.txt

browser: $(DEVELOPMENT) ## install what the tests of the interface need: a browser and its driver
	$(BIN)/python tests/helpers/browser.py

postgresql: $(DEVELOPMENT) ## install what the tests of the shared server need: PostgreSQL and its driver

screenshots: browser ## update the pictures in docs/images
	$(BIN)/python -m pytest tests/notebooks/test_interface.py tests/notebooks/test_guides_interface.py \
		tests/notebooks/test_release.py tests/notebooks/test_keep_pins.py --pictures docs/images

bench: export ONLY := $(ONLY)
bench: $(INSTALLED) ## measure the speed against named peers, and update benchmarks/RESULTS.md (slow; ONLY=name for one)
	$(BIN)/python benchmarks/results.py $(if $(ONLY),--only $$ONLY)

reliability: $(INSTALLED) ## test with kills, load and damaged files, and update benchmarks/RESULTS.md (slow)
	$(BIN)/python benchmarks/results.py --only reliability damage

# With NOTEBOOKS, only these are compared, and RESULTS.md stays as it is.
reproduce: export NOTEBOOKS := $(NOTEBOOKS)
reproduce: $(INSTALLED) ## compare clones in different environments and with newer releases, and update RESULTS.md (slow)
	$(BIN)/python $(if $(NOTEBOOKS),tools/reproduce.py $$NOTEBOOKS,benchmarks/results.py --only reproduce upgrades)

help:
	@awk -F ':.*## ' '/^##@/ {print substr($$0, 5) ":"} /^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

# Install mlflow_lifecycle/ as an editable package, so that it can be imported from any folder.
INSTALL_LIFECYCLE = $(UV) pip install --no-config --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .

# Copy the files from uv's cache. With links, an edit in .venv would change the cache and every environment that is built
# from it later. Copying takes 8 seconds instead of 2.
# PySpark has to be built. It is built with the setuptools version of the lock file, which is verified, too.
SYNC = $(UV) pip sync --no-config --quiet --link-mode copy --python $(BIN)/python --require-hashes --require-build-hashes \
	--build-constraints requirements.txt

# $(INSTALLED) is missing while packages are installed. After an interruption, the next make therefore starts with an
# empty environment, since pip may be missing in the interrupted one.
BEGIN = rm -f $(INSTALLED)

# pip installs uv and verifies its hash. uv then installs the other packages the same way, but faster. The pip of
# $(PYTHON) is used, because installing one in .venv takes two seconds. Some Pythons have none, such as Debian's without
# python3-pip; only then .venv gets one.
INSTALL_UV = install --quiet --disable-pip-version-check --require-hashes --requirement .venv/uv.txt

$(INSTALLED): requirements.txt $(wildcard pyproject.toml)
	@$(PYTHON) -c "import sys; v = sys.version_info; sys.exit(not (3, 11) <= v < (3, 15) and \
		f'This project needs Python 3.11 to 3.14, and $(PYTHON) is {v.major}.{v.minor}. Try: make PYTHON=python3.12')"
	$(PYTHON) -m venv --without-pip $(if $(wildcard $@),,--clear) .venv
	@$(BEGIN)
	@sed -n '/^uv==/,/^    # via/p' requirements.txt > .venv/uv.txt
	$(PYTHON) -m pip --python $(BIN)/python $(INSTALL_UV) || \
		($(BIN)/python -m ensurepip && $(BIN)/python -m pip $(INSTALL_UV))
	$(SYNC) requirements.txt
	@$(INSTALL_LIFECYCLE)
	@touch $@

$(DEVELOPMENT): requirements-dev.txt $(INSTALLED)
	@$(BEGIN)
	$(SYNC) requirements-dev.txt
	@$(INSTALL_LIFECYCLE)
	@touch $(INSTALLED) $@

$(SCALE): requirements-scale.txt $(DEVELOPMENT)
	@$(BEGIN)
	$(SYNC) requirements-scale.txt
	@$(INSTALL_LIFECYCLE)
	@touch $(INSTALLED) $(DEVELOPMENT) $@
