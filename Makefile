# Every target does the set-up it needs on a fresh clone and reuses it the next time.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help train test test-faults test-papers check format bench figures clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Carryover needs Python 3.11 or newer; set PYTHON=python3.11")'
	@echo "setting up $(VENV) (once; torch and ray take a few minutes) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,examples]'
	@touch $@

train: $(READY)  ## train examples/digits.yaml with 4 workers
	@$(BIN)/carryover train examples/digits.yaml

test: $(READY)  ## run the tests (ten minutes on two cores at most)
	@$(BIN)/pytest -m "not faults and not papers"

test-faults: $(READY)  ## run the tests that kill processes or need root, a browser or a server
	@$(BIN)/pytest -m faults

test-papers: $(READY)  ## run the experiments of papers on real data (six minutes on two quiet cores)
	@$(BIN)/pytest -m papers

check: $(READY)  ## formatting, linting and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(READY)  ## format and fix what can be fixed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(READY)  ## time the kernels and count the bytes on the wire
	@$(BIN)/carryover bench kernels
	@$(BIN)/carryover bench wire

figures: JOBS ?= 2
figures: $(READY)  ## repeat the runs behind the README's table and plot, JOBS=2 at a time
	@$(BIN)/carryover compare examples/digits.yaml --seeds 3 --jobs $(JOBS) --target loss=0.1 \
		--out runs/contrast --plot docs/images/contrast.png \
		--vary 'uncompressed: feedback.kind=saef uplink=none downlink=none' \
		--vary 'saef 1 %: feedback.kind=saef uplink=topk:0.01+int4 downlink=topk:0.01+int4' \
		--vary 'ef 1 %: feedback.kind=ef uplink=topk:0.01+int4 downlink=topk:0.01+int4' \
		--vary 'saef 0.1 %: feedback.kind=saef uplink=topk:0.001+int4 downlink=topk:0.001+int4' \
		--vary 'ef 0.1 %: feedback.kind=ef uplink=topk:0.001+int4 downlink=topk:0.001+int4' \
		--vary 'no feedback 0.1 %: feedback.kind=none uplink=topk:0.001+int4 downlink=topk:0.001+int4'

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
