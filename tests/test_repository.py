"""The repository says one thing once: generated files are those of their sources, nothing is stale, nothing is missing."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from extras import BARE, need, whole_papers

need("train", "data", "plots", "dev")

import jsonschema
import yaml
from radon.complexity import cc_visit

from diffusion_papers.workbench.registry import SHELVES, evidence, lacking, paper, papers, shelves
from diffusion_papers.workbench.results import stale_studies

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(path for path in ROOT.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in path.parts)
SOURCES = ("nbs", "diffusion_papers", "settings.ini", "README.md", "tools", "pyproject.toml",
           "CONTRIBUTING.md", "CHANGELOG.md")


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and not {"__pycache__", ".ipynb_checkpoints", "_proc"} & set(path.parts)}


@pytest.mark.parametrize("command", ["nbdev_export", "nbdev_clean", "readme"])
def test_generated_files_are_current(command, tmp_path):
    for name in SOURCES:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    before = snapshot(tmp_path)
    words = [sys.executable, "tools/readme.py"] if command == "readme" else [str(Path(sys.executable).parent / command)]
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)
    after = snapshot(tmp_path)
    assert before.keys() == after.keys()
    assert [str(name) for name in before if before[name] != after[name]] == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_small_and_compared(notebook):
    assert notebook.stat().st_size < 2_000_000
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    shown = [cell for cell in cells if cell["outputs"]]
    exempt = [cell for cell in shown if set(cell["metadata"].get("tags", [])) & {"nbval-ignore-output", "nbval-skip"}]
    assert len(exempt) <= max(1, len(shown) / 3)
    assert not any(output["output_type"] == "error" for cell in shown for output in cell["outputs"])
    assert not any("application/vnd.jupyter.widget-view+json" in output.get("data", {})
                   for cell in shown for output in cell["outputs"])
    assert len(cells) < 6 or shown, "no stored outputs"


def test_every_folder_of_notebooks_is_a_shelf_that_is_numbered_from_one_and_listed():
    found = shelves(ROOT / "nbs")
    for shelf, notebooks in found.items():
        numbers = [int(path.stem[:2]) for path in notebooks]
        assert len(set(numbers)) == len(numbers) and (shelf in ("papers", "evidence") or numbers == list(range(1, len(numbers) + 1))), shelf
    sections = yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]
    listed = [section["contents"] for section in sections if isinstance(section, dict) and isinstance(section["contents"], str)]
    assert sorted(listed) == sorted(f"{shelf}/*" for shelf in SHELVES)


SCHEMA = json.loads((ROOT / "tests" / "quarto.schema.json").read_text())


def test_configuration_of_quarto_has_the_keys_that_it_knows():
    jsonschema.Draft202012Validator(SCHEMA).validate(yaml.safe_load((ROOT / "_quarto.yml").read_text()))
    with pytest.raises(jsonschema.ValidationError): jsonschema.validate({"project": {"type": "website"}, "websight": {}}, SCHEMA)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_plain(notebook):
    "Nothing that one builder alone understands: no fences, no front matter; metadata of a few kinds."
    content = json.loads(notebook.read_text())
    check = lambda kind, value: jsonschema.Draft202012Validator({**SCHEMA["$defs"][kind], "$defs": SCHEMA["$defs"]}).validate(value)
    check("notebook", content["metadata"])
    for cell in content["cells"]:
        check("cell", cell["metadata"])
        assert cell["cell_type"] in ("code", "markdown")  # raw cells are front matter
        if cell["cell_type"] == "markdown":
            assert not re.search(r"^(:::|```\{|---\s*$)", "".join(cell["source"]), re.MULTILINE)


@pytest.mark.parametrize("notebook", [path for path in NOTEBOOKS if path.parent.name in SHELVES], ids=lambda path: path.stem)
def test_a_notebook_says_what_one_must_know_and_ends_with_exercises_whose_solutions_are_folded(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    assert "**What you need to know.**" in "".join(cells[0]["source"])
    if notebook.parent.name == "evidence": return  # it tells, and does not teach
    solutions = [cell for cell in cells if "solution" in cell["metadata"].get("tags", [])]
    assert len(solutions) >= 3
    assert all(cell["metadata"]["jupyter"] == {"source_hidden": True, "outputs_hidden": True} for cell in solutions)
    assert all("assert" in "".join(cell["source"]) for cell in solutions)


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"] + [str(n.relative_to(ROOT)) for n in NOTEBOOKS])
def test_links_lead_somewhere(document):
    path = ROOT / document
    text = path.read_text()
    if path.suffix == ".ipynb":
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"]
                         if cell["cell_type"] == "markdown")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http", "#", "mailto"))]
    missing = [link for link in links
               if not any((path.parent / (link.split("#")[0] + end)).exists() for end in ("", ".md"))]
    assert missing == []


@pytest.mark.parametrize("slug", whole_papers())
def test_a_paper_offers_what_the_contract_asks(slug):
    assert lacking(slug) == []
    assert evidence(slug).headline() and paper(slug).ABOUT.claim


@pytest.mark.parametrize("slug", whole_papers())
def test_stored_results_are_of_todays_code(slug):
    path, module = ROOT / "data" / "results" / f"{slug}.json", evidence(slug)
    results = json.loads(path.read_text())
    assert stale_studies(results, module.STUDIES) == set(), f"make results PAPER={slug} VERIFY=1, or without VERIFY=1 where that says no"
    stored = [experiment["setting"] for experiment in results["experiments"]]
    assert all(setting in stored for setting in module.EXPERIMENTS), f"make results PAPER={slug}"


@pytest.mark.parametrize("slug", whole_papers())
def test_every_study_has_a_probe(slug):
    module = evidence(slug)
    assert module.PROBES.keys() == module.STUDIES.keys() and all(module.PROBES.values())
    asked = [{"study": name, **setting} for name, settings in module.PROBES.items() for setting in settings]
    assert not [setting for setting in asked if setting in module.EXPERIMENTS], "a probe is smaller than an experiment"


@pytest.mark.parametrize("slug", whole_papers())
def test_a_papers_module_shows_its_method(slug):
    names = [name for name in paper(slug).__all__ if not name.startswith("_")]
    assert len(names) <= 35, sorted(names)


@pytest.mark.parametrize("slug", whole_papers())
def test_a_first_result_comes_soon(slug):
    [notebook] = (ROOT / "nbs" / "papers").glob(f"[0-9][0-9]_{slug}.ipynb")
    inside, lines = False, 0
    for cell in json.loads(notebook.read_text())["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code" and inside: lines += sum(bool(line.strip()) and not line.strip().startswith("#") for line in text.splitlines())
        for heading in re.findall(r"^## (.*)$", text, re.MULTILINE) if cell["cell_type"] == "markdown" else ():
            if heading in ("Implementation", "The claim, tested"): inside = heading == "Implementation"
    assert not inside and 0 < lines <= 500, lines


@pytest.mark.parametrize("module", sorted((ROOT / "diffusion_papers").rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_functions_are_simple(module):
    parts = [part for block in cc_visit(module.read_text()) for part in (block, *getattr(block, "methods", ()))]
    assert [(part.name, part.complexity) for part in parts if part.complexity > 15 and part.letter != "C"] == []


@pytest.mark.parametrize("checkpoint", sorted((ROOT / "data" / "checkpoints").glob("*.safetensors")),
                         ids=lambda path: path.stem)
def test_shipped_checkpoints_say_how_they_were_made(checkpoint):
    assert checkpoint.stat().st_size < 8_000_000
    about = json.loads(checkpoint.with_suffix(".json").read_text())
    assert {"command", "config", "machine", "minutes", "metrics"} <= about.keys()
    assert "seed" in about["config"] or "seed" in about["config"]["training"]


@pytest.mark.parametrize("slug", sorted(papers()))
def test_papers_import_with_torch_and_numpy_alone(slug, tmp_path):
    program = BARE + (f"import diffusion_papers.{slug} as paper, torch\npaper.build(paper.CONFIGS['cpu'])\n"
                      f"try: paper.train(paper.CONFIGS['cpu'], {str(tmp_path)!r})\nexcept ImportError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          cwd="/", env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert "pip install 'diffusion_papers[" in done.stdout


def shelf_of(module):
    "The shelf on which a module stands; the command line stands above all of them."
    parts = module.removeprefix("diffusion_papers").strip(".").split(".")
    return parts[0] if len(parts) > 1 else "papers" if parts[0] in papers() else ""


def imported_by(path):
    "The modules of the package that a module imports, at its top or inside of a function."
    here = ("diffusion_papers", *path.relative_to(ROOT / "diffusion_papers").with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import): yield from (alias.name for alias in node.names if alias.name.startswith("diffusion_papers"))
        if not isinstance(node, ast.ImportFrom): continue
        base = ".".join([*here[:len(here) - node.level], *filter(None, [node.module])]) if node.level else node.module or ""
        if not base.startswith("diffusion_papers"): continue
        file = ROOT.joinpath(*base.split("."))
        yield from ((f"{base}.{alias.name}" for alias in node.names) if file.is_dir() else [base])


def test_imports_go_down_only():
    "evidence > papers > topics > core > workbench; a paper never imports a paper, nor evidence other evidence."
    order, wrong = ["", *SHELVES], []
    for path in sorted((ROOT / "diffusion_papers").rglob("*.py")):
        if path.name in ("_modidx.py", "__init__.py"): continue
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for name in set(imported_by(path)) - {"diffusion_papers", "diffusion_papers.__version__"}:
            mine, theirs = shelf_of(module), shelf_of(name)
            same = mine == theirs and mine in ("papers", "evidence") and name != module
            if order.index(theirs) < order.index(mine) or same: wrong.append(f"{module} imports {name}")
    assert wrong == []
