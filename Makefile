# Two commands do everything on a fresh machine: `make workbook` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
JOBS   ?= 2

export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_PROGRESS_BARS := 1

.PHONY: workbook test lab benchmark clean

$(VENV)/ready: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints-cpu.txt -e ".[notebooks,test]"
	touch $@

workbook: $(VENV)/ready ## run every notebook on the embedded model and corpora
	HF_HUB_OFFLINE=1 $(BIN)/nsvd run all --jobs $(JOBS) -p fresh true
	@echo "executed notebooks: notebooks/executed   figures: figures   numbers: data/results"

test: $(VENV)/ready ## lint and test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

lab: $(VENV)/ready ## explore in JupyterLab
	$(BIN)/jupyter lab notebooks

benchmark: $(VENV)/ready ## cost of the statistics pass and of the decompositions, as ratios
	$(BIN)/python benchmarks/costs.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
