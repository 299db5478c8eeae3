"""The site, in _docs: every notebook as a page, and an API reference. Sphinx, MyST-NB and sphinx-book-theme build it; this adapts what they read."""
import functools
import html
import importlib
import inspect
import json
import re
import shutil
import sys
from pathlib import Path

import nbformat
import plotly
from fastcore.docments import docments
from sphinx.cmd.build import build_main

from diffusion_papers.workbench.files import whole_file
from diffusion_papers.workbench.registry import shelves

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS, PAGES, OUT = ROOT / "nbs", ROOT / "_proc" / "site", ROOT / "_docs"
PLOTLY = "application/vnd.plotly.v1+json"
DOCUMENTS = {"../CHANGELOG.md": "CHANGELOG.md", "../CONTRIBUTING.md": "CONTRIBUTING.md"}


def notebooks():
    "All notebooks in reading order, by caption of the list of pages; the evidence stands below its paper."
    at_hand = sorted(path for path in NOTEBOOKS.glob("*.ipynb") if path.stem != "index")
    listed = {shelf.capitalize(): pages for shelf, pages in shelves(NOTEBOOKS).items() if shelf != "evidence"}
    return {"": [NOTEBOOKS / "index.ipynb"], **listed, "Reference": at_hand}


def all_notebooks():
    "All of them in one list."
    return [path for group in notebooks().values() for path in group] + shelves(NOTEBOOKS).get("evidence", [])


def caption(markdown):
    "The last paragraph before a picture, as its alternative text."
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"[*`#>$\\|]", "", markdown))
    lines = [line for line in plain.strip().splitlines() if line.strip()]
    return "Picture: " + (lines[-1].strip()[:300].rstrip(":") if lines else "what the cell above shows")


def figure_html(figure, name, about, up):
    "A plotly figure as a place that `figures.js` draws into."
    content = json.dumps(figure).replace("</", "<\\/")
    return (f"<script src='{up}_static/plotly.min.js' defer></script>"
            f"<div class='figure-place' id='{name}' role='group' aria-label='{html.escape(about, quote=True)}'></div>"
            f"<script type='application/json'>{content}</script>")


def module_of(path):
    "The module that a notebook writes, without the package's name; None where it writes none."
    found = re.search(r'#\| default_exp ([\w.]+)', path.read_text(encoding="utf-8"))
    return found[1] if found and found[1] != "__main__" else None


@functools.cache
def reference():
    "Public name -> the modules that have it, and every module itself."
    found = {}
    for name in filter(None, map(module_of, all_notebooks())):
        found[name] = [name]
        for public in importlib.import_module(f"diffusion_papers.{name}").__all__: found.setdefault(public, []).append(name)
    return found


def linked(text, home, up):
    "A page's text whose words in code style lead to the reference, once each: names of the page's own module, or of one alone."
    seen = set()
    def link(found):
        word = found[1]
        modules = reference().get(word, [])
        module = home if home in modules else modules[0] if len(modules) == 1 else None
        if module is None or word in seen: return found[0]
        seen.add(word)
        return f"[`{word}`]({up}api/{module}.md" + (")" if word == module else f"#{word.lower()})")
    parts = re.split(r"(^```.*?^```|^#.*?$)", text, flags=re.DOTALL | re.MULTILINE)  # neither in fences nor in headings
    return "".join(part if part.startswith(("```", "#")) else re.sub(r"(?<![`\[])`([\w.]+)`(?!`)", link, part) for part in parts)


def adapted_code(cell, directives, about, figure):
    "A code cell, in place: tags for what is folded or left out, an alternative text; `figure` makes a place of a plotly figure."
    tags = (["hide-cell"] if "solution" in cell.metadata.get("tags", []) else []) + (["remove-input"] if "#| echo: false" in directives else [])
    cell.outputs = [output for output in cell.outputs if output.output_type != "stream" or output.name != "stderr"]
    for output in cell.outputs:
        data = output.get("data", {})
        if PLOTLY in data:
            output.data = {"text/html": figure(data[PLOTLY])}
            tags.append("hide-input")
    cell.metadata = nbformat.from_dict({"tags": tags, "mystnb": {"image": {"alt": about}}})


def adapted(path):
    "A notebook as MyST-NB should read it: no directives, no hidden cells, pictures with alternative texts; a paper begins with what moves."
    notebook, page = nbformat.read(path, as_version=4), path.relative_to(NOTEBOOKS)
    up, home, before, cells, moving = "../" * (len(page.parts) - 1), module_of(path), "", [], None
    for number, cell in enumerate(notebook.cells):
        directives = {line.strip() for line in cell.source.splitlines() if line.startswith("#| ")}
        if "#| hide" in directives or any(line.startswith("#| default_exp") for line in directives): continue
        cell.source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#| ")).strip("\n")
        if cell.cell_type == "markdown":
            for there, here in DOCUMENTS.items(): cell.source = cell.source.replace(f"]({there})", f"]({here})")
            before = cell.source
            cell.source = linked(cell.source, home, up)
        else:
            figures = [output.data[PLOTLY] for output in cell.outputs if PLOTLY in output.get("data", {})]
            about = caption(before)
            adapted_code(cell, directives, about, lambda figure: figure_html(figure, f"figure-{number}", about, up))
            if figures and moving is None and page.parts[0] == "papers":
                text = before.partition("\n\n")[2]
                moving = nbformat.v4.new_markdown_cell(f"{figure_html(figures[0], 'figure-first', about, up)}\n\n{text}")
        cells.append(cell)
    source = f"_static/notebooks/{page.as_posix()}"
    links = f'<p class="page-links"><a href="{up}{source}" download>Download this notebook</a>, or run it: <code>make lab</code>, then open <code>{page.as_posix()}</code>.</p>'
    title, _, rest = cells[0].source.partition("\n\n**Paper.**")
    if rest: cells.insert(1, nbformat.v4.new_markdown_cell("**Paper.**" + rest))
    cells[0].source = title
    place = len(cells) if "\n## " in title else 1  # a first cell with sections of its own is not interrupted
    cells[place:place] = [nbformat.v4.new_markdown_cell(links), *([moving] if moving else [])]
    if page.parts[0] == "papers" and (NOTEBOOKS / "evidence" / page.name).is_file():
        below = f"How the numbers were made <../evidence/{page.stem}>"
        cells.append(nbformat.v4.new_markdown_cell(f"```{{toctree}}\n:hidden:\n\n{below}\n```"))
    notebook.cells = cells
    return notebook


def contents(listed, api):
    "The list of all pages, for the first one."
    listed["Reference"] += api
    trees = [f"```{{toctree}}\n:hidden:\n:caption: {title}\n\n" + "\n".join(pages) + "\n```" for title, pages in listed.items() if title]
    return nbformat.v4.new_markdown_cell("\n\n".join(trees))


def described(thing):
    "The arguments of a function as a table, from the comments of its signature; without comments, as a line of names."
    rows = []
    for name, about in docments(thing, full=True, returns=True).items():
        default, what = about.get("default", inspect.Parameter.empty), (about.get("docment") or "").replace("|", "\\|").replace("\n", " ")
        if name == "self" or name in ("args", "kwargs", "return") and not what: continue
        shown = "" if default is inspect.Parameter.empty else f"`{default!r}`"
        if len(shown) > 60: shown = f"`{type(default).__name__}(...)`"  # a whole configuration
        rows.append(("*returns*" if name == "return" else f"`{name}`", shown, what))
    if not any(what for *_, what in rows): return f"Arguments: {', '.join(name for name, *_ in rows)}." if rows else ""
    if not any(shown for _, shown, _ in rows): rows = [(name, what) for name, _, what in rows]
    heading = ("argument", "default", "what it is") if len(rows[0]) == 3 else ("argument", "what it is")
    return "```{rst-class} arguments\n```\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *rows))


def entry(name, thing):
    "One public name of a module."
    if not inspect.isclass(thing): thing = inspect.unwrap(thing)  # what a cache wraps
    if not callable(thing) or not (inspect.isfunction(thing) or inspect.isclass(thing)):
        parts = thing if isinstance(thing, (dict, tuple, list)) else [thing]
        held = [f"`{part}`" for part in parts if isinstance(part, (str, int, float)) and len(str(part)) < 60]
        return f"## `{name}`\n\nA constant of type `{type(thing).__name__}`" + (f": {', '.join(held)}." if 0 < len(held) < 30 else ".")
    text = inspect.getdoc(thing) if "__doc__" in vars(thing) or inspect.isfunction(thing) else ""
    parts = [f"## `{name}`", text or ""]
    try: parts.append(described(thing))
    except (TypeError, ValueError, OSError): pass
    if inspect.isclass(thing):
        for method, function in vars(thing).items():
            if method.startswith("_") or not inspect.isfunction(function): continue
            parts += [f"### `{name}.{method}`", inspect.cleandoc(function.__doc__ or ""), described(function)]
    return "\n\n".join(part for part in parts if part)


def api_page(module, notebook):
    "The reference of a module."
    names = [name for name in module.__all__ if not name.startswith("_")]
    about = (module.__doc__ or "").strip()
    where = f"`import {module.__name__}`, explained in [{notebook.stem}](../{notebook.relative_to(NOTEBOOKS).as_posix()})."
    return "\n\n".join([f"# `{module.__name__.removeprefix('diffusion_papers.')}`", about, where, *(entry(name, getattr(module, name)) for name in names)]) + "\n"


def write_api():
    "All pages of the reference; their names."
    (PAGES / "api").mkdir()
    written = []
    for path in all_notebooks():
        name = module_of(path)
        if name is None: continue
        module = importlib.import_module(f"diffusion_papers.{name}")
        with whole_file(PAGES / "api" / f"{name}.md") as unfinished: unfinished.write_text(api_page(module, path), encoding="utf-8")
        written.append(f"api/{name}")
    return written


def write_pages():
    "Everything that Sphinx reads."
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "tools" / "site_theme", PAGES, ignore=shutil.ignore_patterns("*.css", "*.js", "*.svg", "__pycache__"))
    static = PAGES / "_static"
    static.mkdir()
    for kind in ("css", "js", "svg"):
        for file in (ROOT / "tools" / "site_theme").glob(f"*.{kind}"): shutil.copy(file, static)
    shutil.copy(Path(plotly.__file__).parent / "package_data" / "plotly.min.js", static)
    for document in DOCUMENTS.values():  # the notebooks are at the top of the site
        with whole_file(PAGES / document) as unfinished: unfinished.write_text((ROOT / document).read_text(encoding="utf-8").replace("](nbs/", "]("), encoding="utf-8")
    groups = notebooks()
    for path in all_notebooks():
        page = path.relative_to(NOTEBOOKS)
        for place in (PAGES, static / "notebooks"): (place / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, static / "notebooks" / page)
        notebook = adapted(path)
        if page.stem == "index":
            listed = {title: [p.relative_to(NOTEBOOKS).with_suffix("").as_posix() for p in paths] for title, paths in groups.items()}
            notebook.cells.append(contents(listed, [*write_api(), "CHANGELOG", "CONTRIBUTING"]))
        with whole_file(PAGES / page) as unfinished: nbformat.write(notebook, unfinished)


def lighten(page):
    "Let a page be read before its scripts are there: what can wait, waits."
    text = re.sub(r'<link rel="preload" as="script"[^>]*>\s*', "", page.read_text(encoding="utf-8"))
    text = re.sub(r'styles/theme\.css\?digest=\w+', "basic.css", text)  # all that it holds is an import of that one, a round trip more
    text = re.sub(r'<script[^>]*scripts/fontawesome\.js[^>]*></script>\s*', "", text)  # its icons come as a font, too, a fifth of the size
    options = (OUT / "_static" / "documentation_options.js").read_text(encoding="utf-8")  # a few words, not worth a request
    text = re.sub(r'<script src="[^"]*documentation_options\.js[^"]*"></script>', lambda _: f"<script>{options}</script>", text)
    if 'class="math' not in text: text = re.sub(r'<script[^>]*mathjax/tex-chtml\.js[^>]*></script>\s*', "", text)
    if page.stem != "search":  # which starts as soon as it is read
        later = "doctools|sphinx_highlight|sphinx-book-theme|searchtools|language_data|searchindex"
        text = re.sub(rf'<script (src="[^"]*\b(?:{later})\.js)', r"<script defer \1", text)
    with whole_file(page) as unfinished: unfinished.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_pages()
    built = PAGES.parent / "html"  # MyST-NB puts files of its own beside it
    for folder in (built, OUT): shutil.rmtree(folder, ignore_errors=True)
    failed = build_main(["-q", "-W", "--keep-going", "-b", "html", "-d", str(PAGES.parent / "doctrees"), str(PAGES), str(built)])
    shutil.move(built, OUT)
    for page in OUT.rglob("*.html"): lighten(page)
    print(f"{len(list(OUT.rglob('*.html')))} pages in {OUT.relative_to(ROOT)}")
    sys.exit(failed)
