# Copyright (c) ClinicalFMamba contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help venv test test-all demo bundles lint format clean

VENV ?= .venv
DEMO ?= demo
# The first interpreter that starts and is supported; say `make PYTHON=... venv` for another one.
PYTHON ?= $(shell for python in python3 python3.12 python3.11 python3.10; do \
	$$python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$python && break; done)

# Threads that spin while they wait slow each other down tenfold where the cores are busy with something else.
export OMP_WAIT_POLICY ?= passive

BUNDLE := bundles/clinicalfmamba_fusion
RUN := $(VENV)/bin/python -m monai.bundle run --bundle_root $(BUNDLE)
PHANTOM := PYTHONPATH=$(BUNDLE) $(VENV)/bin/python -m scripts.phantom
CODE := custom_nets bundles/*/scripts tests benchmarks tools
# each bundle has a package called scripts, and a process only one: the grading bundle's tests run by themselves
PYTEST := "$(VENV)/bin/python" -m pytest
BLACK := $(VENV)/bin/black --line-length 120 --skip-magic-trailing-comma

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12
	@echo
	@echo "Variables: PYTHON (3.10 to 3.12), VENV (default .venv), DEMO (default demo)."
	@echo "On a machine without GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu gets the small torch."

venv: $(VENV)/.ready ## Make the environment .venv with the tested versions of everything

$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt
	@echo "== Environment in $(VENV), versions from constraints.txt (minutes, mostly downloads)"
	@version=$$("$(PYTHON)" -c 'import sys; print(*sys.version_info[:2], sep=".")' 2>/dev/null || echo none); \
	case $$version in 3.10 | 3.11 | 3.12) ;; \
	*) echo "Python 3.10, 3.11 or 3.12 is needed, found: $$version. Name one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1;; esac
	@"$(PYTHON)" -m venv "$(VENV)"
	@"$(VENV)/bin/python" -m pip install -qq --disable-pip-version-check --constraint constraints.txt torch
	@"$(VENV)/bin/python" -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable ".[bundle,dev]"
	@touch "$@"

test: venv ## Run the tests (minutes on two cores, no GPU, no downloads besides packages)
	@echo "== Tests"
	@$(PYTEST) -m "not slow" tests && status=0 || status=$$?; \
	$(PYTEST) -m "not slow" tests/glioma_grading || status=$$?; exit $$status

test-all: venv ## Run all tests, the slow ones too
	@echo "== All tests"
	@$(PYTEST) tests && status=0 || status=$$?; $(PYTEST) tests/glioma_grading || status=$$?; exit $$status

demo: venv ## Fuse generated brains in 2D and 3D with the shipped weights, and say where the pictures are
	@echo "== Generating brains with a tumour in $(DEMO): MRI, CT and PET slices, T2 and FLAIR volumes"
	@$(PHANTOM) --output_dir "$(DEMO)/slices" --kind slices --subjects 1 --seed 6
	@$(PHANTOM) --output_dir "$(DEMO)/volumes" --kind volumes --subjects 1 --seed 6
	@echo "== Fusing the slices (2D)"
	@$(RUN) --config_file $(BUNDLE)/configs/inference.json \
		--dataset_dir "$(DEMO)/slices" --output_dir "$(DEMO)/fused_slices"
	@echo "== Fusing the volumes (3D)"
	@$(RUN) --config_file "['$(BUNDLE)/configs/inference.json','$(BUNDLE)/configs/volume.json']" \
		--dataset_dir "$(DEMO)/volumes" --output_dir "$(DEMO)/fused_volumes"
	@echo "== Done. Panels (MRI, partner, fused, difference), best looked at first:"
	@find "$(DEMO)/fused_slices" "$(DEMO)/fused_volumes" -name '*_panel.png' | sort
	@echo "Reports of every case, to open in a browser:"
	@find "$(DEMO)/fused_slices" "$(DEMO)/fused_volumes" -name index.html | sort
	@echo "Fused images:"
	@find "$(DEMO)/fused_slices" "$(DEMO)/fused_volumes" -name '*_fused.*' | sort

bundles: venv ## Pack each bundle, weights and networks in, as dist/<name>-<version>.zip
	@"$(VENV)/bin/python" tools/pack_bundles.py --output_dir dist

lint: venv ## Check formatting, style and types
	@$(BLACK) --check $(CODE)
	@"$(VENV)/bin/isort" --check-only $(CODE)
	@"$(VENV)/bin/flake8" $(CODE)
	@"$(VENV)/bin/mypy"

format: venv ## Format the code
	@$(BLACK) $(CODE)
	@"$(VENV)/bin/isort" $(CODE)

clean: ## Remove the environment, the demo and caches
	@echo "== Removing $(VENV), $(DEMO), build and caches"
	@rm -rf "$(VENV)" "$(DEMO)" build dist *.egg-info .mypy_cache .pytest_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
