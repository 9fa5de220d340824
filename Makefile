# Works with GNU make 3.81 and newer and any POSIX shell (on Windows: Git Bash).
VENV   := .venv
ifeq ($(OS),Windows_NT)
PYTHON ?= python
BIN    := $(VENV)/Scripts
else
PYTHON ?= python3
BIN    := $(VENV)/bin
endif
PY     := $(BIN)/python
STAMP  := $(VENV)/.installed
# Jupyter runs as root only with this option; in a container every user is root.
ROOT   := $(if $(filter 0,$(shell id -u 2>/dev/null)),--allow-root)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install lab course pages test lint notebooks claims readme slides bundle train-toybox lock clean

help: ## show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile

install: $(STAMP) ## make .venv with the exact versions of requirements.lock

# The stamp is written last, so an interrupted install is taken up again.
$(STAMP): requirements.lock pyproject.toml
	@py="$(PYTHON)"; if [ -x $(PY) ]; then py=$(PY); fi; \
	"$$py" -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))" 2>/dev/null || { \
	  echo "Python 3.10 to 3.13 is needed and '$$py' is not one of these; name one: make install PYTHON=python3.12" >&2; \
	  exit 1; }
	@echo "Installing the course into $(VENV): some minutes the first time, and about 6 GB on Linux."
	@$(PY) -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv $(VENV)
	@$(PY) -m pip install -q -r requirements.lock
	@$(PY) -m pip install -q --no-deps -e .
	@touch $(STAMP)

lab: $(STAMP) ## open the course in JupyterLab
	$(PY) -m jupyterlab $(if $(CI),--no-browser) $(ROOT) --config=tools/jupyter_server_config.py

course: $(STAMP) ## run every notebook and time it (PROFILE=smoke|cpu|gpu, ONLY="01 03")
	$(PY) tools/run_course.py $(if $(PROFILE),--profile $(PROFILE)) $(if $(ONLY),--only $(ONLY))

pages: $(STAMP) ## HTML pages of the notebooks as they are, into build/, to be read without a network
	$(PY) tools/pages.py

notebooks: $(STAMP) ## as `make course`, and store the outputs in the notebooks
	$(PY) tools/run_course.py --write $(if $(PROFILE),--profile $(PROFILE)) $(if $(ONLY),--only $(ONLY))

test: $(STAMP) ## all tests, and every notebook in the smoke profile
	COURSE_PROFILE=smoke $(PY) -m pytest --nbval-lax --nbval-current-env \
	  --nbval-sanitize-with tests/nbval_sanitize.cfg tests notebooks

lint: $(STAMP) ## ruff: rules and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

claims: $(STAMP) ## measure editing and the methods of Part 4, and judge the claims (rows that exist are kept)
	$(PY) measurements/unclip.py
	$(PY) measurements/editing.py
	$(PY) measurements/keeping.py
	$(PY) measurements/methods.py
	$(PY) measurements/pairs.py
	$(PY) measurements/styles.py
	$(PY) measurements/claims.py

readme: $(STAMP) ## fill the tables of README.md from data/results/ and data/checkpoints/
	$(PY) tools/readme.py

slides: $(STAMP) ## build all slide decks, in English and Korean, into build/slides/
	bash slides/build.sh

bundle: pages slides ## a folder for a USB stick that installs without a network (BUNDLE=build/bundle)
	$(PY) tools/bundle.py $(BUNDLE)

# Stages of the Toybox Stable Diffusion, each resumable. Several processes: LAUNCH="torchrun --nproc_per_node 2".
LAUNCH  ?= python
MINUTES ?= 60
SD      := data/checkpoints/toybox-sd
train-toybox: $(STAMP) ## train and measure all Toybox models from nothing (MINUTES= for each stage, LAUNCH=)
	$(BIN)/$(LAUNCH) training/toybox_vae.py --minutes $(MINUTES) --ship $(SD)/vae
	$(BIN)/$(LAUNCH) training/toybox_clip.py --minutes $(MINUTES) --ship $(SD)
	$(BIN)/$(LAUNCH) training/toybox_unet.py --minutes $(MINUTES) --ship $(SD)
	$(BIN)/$(LAUNCH) training/toybox_judge.py --minutes $(MINUTES) --ship data/checkpoints/toybox-judge
	$(BIN)/$(LAUNCH) measurements/toybox_model.py

lock: $(STAMP) ## write requirements.lock again (LOCK_FLAGS=--upgrade for the newest versions)
	$(PY) -m uv pip compile -q --universal --python-version 3.10 --custom-compile-command "make lock" \
	  $(LOCK_FLAGS) pyproject.toml --extra dev --extra lab -o requirements.lock

clean: ## remove what was built; .venv stays
	rm -rf build .pytest_cache .ruff_cache *.egg-info
	find . -path ./$(VENV) -prune -o -path ./slides/node_modules -prune -o -type d \
	  \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
