# make run     the quickstart, executed into build/project.html
# make test    the fast tests, which need nothing more
# `make help` lists the rest. Nothing needs an activated environment.

PYTHON ?= python3
EXPERIMENT ?= iris_classification
NOTEBOOKS ?= $(shell git ls-files '*.ipynb' ':!benchmarks')

ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
else
BIN := .venv/bin
endif

# Guide 06 needs Spark and Java, which the basic set-up leaves out.
OUT_OF_REACH = $(shell (command -v java && $(BIN)/python -c "import pyspark") >/dev/null 2>&1 || echo guides/06_scale_out.ipynb)
TO_REACH_IT = It needs Java 17 or later (on Debian: apt-get install openjdk-17-jre-headless) and: make scale

INSTALLED := .venv/installed.txt
DEVELOPMENT := .venv/development.txt
SCALE := .venv/scale.txt
UV := $(BIN)/uv

# Python keeps its compiled files, which halves every later start, even where the machine's setting says not to.
unexport PYTHONDONTWRITEBYTECODE
# An environment of another project that is active must not be taken for ours.
unexport VIRTUAL_ENV
unexport PYTHONPATH

.PHONY: run test coverage test-all guides report ui lab notebooks screenshots site bench reliability reproduce lock lint browser postgresql scale clean help
.DELETE_ON_ERROR:

run: $(INSTALLED) ## execute project.ipynb into build/project.html
	@$(BIN)/python tools/run.py --shutdown immediate project.ipynb || { $(BIN)/python -m lifecycle check; false; }

# One process more than there are cores, because tests also wait: for servers, kernels and locks.
PYTEST = $(BIN)/python -m pytest --numprocesses $(shell $(BIN)/python -c "import os; print(os.cpu_count() + 1)") \
	--dist loadfile --no-loadscope-reorder

test: $(INSTALLED) ## run the tests that need nothing but the basic set-up
	$(PYTEST) -m "not extended"

coverage: $(INSTALLED) ## say how much of the library its fast tests reach, branches included
	rm -f .coverage*
	$(subst -m pytest,-m coverage run -m pytest,$(PYTEST)) tests/lifecycle -m "not extended"
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --show-missing --skip-covered

test-all: $(INSTALLED) ## run all tests that this machine has the parts for
	$(PYTEST)

guides: $(INSTALLED) ## execute all guides into build/, on the quickstart's store
	@$(if $(OUT_OF_REACH),echo "Left out: $(OUT_OF_REACH). $(TO_REACH_IT)")
	$(BIN)/python tools/run.py $(filter-out $(OUT_OF_REACH),$(sort $(wildcard guides/*.ipynb)))

# By the environment, because a quote in the name would end one of the shell's.
report: export EXPERIMENT := $(EXPERIMENT)
report: $(INSTALLED) ## make the report of an experiment, from its runs, into build/ (EXPERIMENT=name for another one)
	@$(BIN)/python -m lifecycle report "$$EXPERIMENT" --output "reports/$$EXPERIMENT"
	@$(BIN)/python tools/report_page.py "reports/$$EXPERIMENT" build/experiment_report.html
	@echo "As a page: build/experiment_report.html"

ui: $(INSTALLED) ## start the MLflow interface on the quickstart's store (PORT=5001 for another port)
	$(BIN)/python -m lifecycle ui $(if $(PORT),--port $(PORT))

# JUPYTER_PREFER_ENV_PATH and no JUPYTER_PATH: a kernel "python3" from elsewhere on the machine must not be taken for ours.
lab: export JUPYTER_PREFER_ENV_PATH = 1
lab: export JUPYTER_PATH =
lab: $(DEVELOPMENT) ## work in the notebook: JupyterLab with the right kernel
	$(BIN)/python -m jupyterlab --allow-root --KernelManager.transport_encryption=auto project.ipynb

notebooks: $(INSTALLED) ## execute the committed notebooks in a fresh store and write their outputs
	$(BIN)/python tools/notebooks.py $(filter-out $(OUT_OF_REACH),$(NOTEBOOKS))
	@$(if $(OUT_OF_REACH),echo "Left out: $(OUT_OF_REACH). $(TO_REACH_IT)")

screenshots: browser ## take the pictures in docs/images
	$(BIN)/python -m pytest tests/notebooks/test_interface.py tests/notebooks/test_guides_interface.py \
		tests/notebooks/test_release.py --pictures docs/images

site: $(DEVELOPMENT) ## build the site into build/site, from what is stored in the notebooks
	$(BIN)/python -m sphinx --quiet --fail-on-warning -c docs -d build/site-doctrees . build/site
	@echo "The site: build/site/index.html"

reliability: $(INSTALLED) ## kill, crowd and damage everything, and write what survives to benchmarks/RESULTS.md; it takes long
	$(BIN)/python benchmarks/results.py --only reliability damage

bench: $(INSTALLED) ## measure everything against its named peers, and write benchmarks/RESULTS.md; it takes long
	$(BIN)/python benchmarks/results.py $(if $(ONLY),--only $(ONLY))

# With NOTEBOOKS, for some of them, and nothing is written.
reproduce: $(INSTALLED) ## execute fresh clones in unlike situations and with newer releases, compare, and write RESULTS.md
	$(BIN)/python $(if $(filter command line environment,$(origin NOTEBOOKS)),tools/reproduce.py $(NOTEBOOKS),benchmarks/results.py --only reproduce upgrades)

# One resolution: the whole first, then each part held to it.
COMPILE = $(UV) pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest \
	--custom-compile-command "make lock" $(if $(UPGRADE),--upgrade)
lock: $(INSTALLED) ## compile the locks from pyproject.toml (UPGRADE=1 to renew what is not pinned there)
	$(COMPILE) --group scale --generate-hashes --output-file requirements-scale.txt
	$(COMPILE) --group development --generate-hashes --constraint requirements-scale.txt --output-file requirements-dev.txt
	$(COMPILE) --group server --generate-hashes --constraint requirements-scale.txt --output-file deploy/requirements.txt
	$(COMPILE) --group test --generate-hashes --constraint requirements-dev.txt --output-file requirements.txt
	$(COMPILE) --group model --constraint requirements.txt --output-file model_requirements.txt
	$(COMPILE) --group audit --generate-hashes --output-file .github/requirements-audit.txt

lint: $(DEVELOPMENT) ## check code and notebooks with ruff
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/ruff format --check --line-length 88 project.ipynb

browser: $(DEVELOPMENT) ## install what the tests of the interface need: a browser and its driver
	$(BIN)/python tests/helpers/browser.py

postgresql: $(DEVELOPMENT) ## install what the tests of the shared server need: PostgreSQL and its driver

scale: $(SCALE) ## install what guide 06 needs beyond the rest: Spark, PostgreSQL and its driver; Java is yours to install

clean: ## remove the environment and what was built; the store (mlflow.db, mlruns) stays
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' Makefile

# `import lifecycle` and the command work from any folder, and follow what is edited here.
INSTALL_LIFECYCLE = $(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .

# Copies of the files in uv's cache and no links to them: else an edit in .venv would change the cache, and with it every
# environment that is built from it afterwards. It takes 8 seconds in place of 2.
# What has to be built (PySpark) is built by the setuptools of the lock, whose hash is verified, too.
SYNC = $(UV) pip sync --quiet --link-mode copy --python $(BIN)/python --require-hashes --require-build-hashes \
	--build-constraints requirements.txt

# Whoever begins to install takes $(INSTALLED) away until all is there. So an environment that was left half made, maybe
# without a working pip, is known, and made anew from nothing.
BEGIN = rm -f $(INSTALLED)

# pip installs uv with its hash verified; uv installs the rest the same way, faster. It is the pip of $(PYTHON): one of
# its own in .venv takes two seconds, and is made only where $(PYTHON) has none, as Debian's without python3-pip.
INSTALL_UV = install --quiet --disable-pip-version-check --require-hashes --requirement .venv/uv.txt

$(INSTALLED): requirements.txt
	@$(PYTHON) -c "import sys; v = sys.version_info; sys.exit(not (3, 11) <= v < (3, 14) and \
		f'This project needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is {v.major}.{v.minor}. Try: make PYTHON=python3.12')"
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
