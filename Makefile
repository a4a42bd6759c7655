# `make demo` and `make test` need only Python 3.10-3.14 and a package index; both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
TORCH := $(shell sed -n 's/^\(torch==[^; ]*\).*/\1/p' constraints.txt)
PIP_OPTIONS := --quiet --disable-pip-version-check

.PHONY: demo bench results test oldest check wheel clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py

# The short form of the cost benchmark; without --short it prints what stands in docs/benchmarks.md.
bench: $(STAMP)
	cd examples && ../$(BIN)/python -m benchmarks.cost --short

# The tables and figures of docs/results.md from the cells in docs/results.
results: $(STAMP)
	cd examples && ../$(BIN)/python -m benchmarks.results

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
	$(MAKE) wheel

# With the oldest versions that pyproject.toml lets in; of torch there is no small build of that age.
oldest:
	$(PYTHON) -m venv --clear $(VENV)-oldest
	$(VENV)-oldest/bin/pip install $(PIP_OPTIONS) -c constraints-oldest.txt -e ".[dev]"
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest -n 2

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The wheel must work without this checkout and without the extras: built, then imported in an environment of its own.
wheel: $(STAMP)
	@dir=$$(mktemp -d) && trap 'rm -rf "$$dir"' EXIT && \
	echo "building the wheel and importing it in an empty environment" && \
	$(BIN)/python -m build --quiet --wheel --outdir "$$dir" . && \
	$(PYTHON) -m venv "$$dir/venv" && \
	"$$dir/venv/bin/pip" install $(PIP_OPTIONS) --no-compile "$(TORCH)" && \
	"$$dir/venv/bin/pip" install $(PIP_OPTIONS) --no-compile -c constraints.txt "$$dir"/*.whl && \
	"$$dir/venv/bin/pip" check && \
	cd "$$dir" && "$$dir/venv/bin/python" -I -W error -c "$$IMPORT_CHECK" && "$$dir/venv/bin/trpts" --help > /dev/null

define IMPORT_CHECK
import importlib.metadata, importlib.resources, trpts_peft
for name in trpts_peft.__all__:
    getattr(trpts_peft, name)
assert importlib.resources.files(trpts_peft).joinpath("py.typed").is_file(), "py.typed is missing from the wheel"
print("imported trpts-peft", importlib.metadata.version("trpts-peft"), "from", trpts_peft.__file__)
endef
export IMPORT_CHECK

# torch goes first: it is the largest and most machine-specific part, and the rest then resolves against it.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install $(PIP_OPTIONS) "$(TORCH)"
	$(BIN)/pip install $(PIP_OPTIONS) -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest build dist runs .mypy_cache .pytest_cache .ruff_cache
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
