"""A first sketch of the site: every notebook as a page with a list of all pages, in _docs. Plotly is written once beside them."""
import html
import json
import shutil
from pathlib import Path

import nbformat
import plotly
from nbconvert import HTMLExporter

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "_docs"
PLOTLY = "application/vnd.plotly.v1+json"
NAVIGATION = ("<nav style='padding:.6rem 1.2rem;font:14px/1.9 system-ui,sans-serif;"
              "border-bottom:1px solid #ccc'>{}</nav>")


def prepared(notebook, depth):
    "Directives and hidden cells taken out, plotly figures as elements that plotly.js draws."
    cells = []
    for number, cell in enumerate(notebook.cells):
        lines = cell.source.splitlines()
        directives = {line.strip() for line in lines if line.startswith("#| ")}
        if "#| hide" in directives or any(line.startswith("#| default_exp") for line in directives): continue
        cell.source = "\n".join(line for line in lines if not line.startswith("#| "))
        cell.source = cell.source.replace(".ipynb)", ".html)") if cell.cell_type == "markdown" else cell.source
        if "#| echo: false" in directives: cell.metadata["transient"] = {"remove_source": True}
        for output in cell.get("outputs", []):
            if PLOTLY in output.get("data", {}):
                name, figure = f"figure-{number}", output.data.pop(PLOTLY)
                draw = (f"const f={json.dumps(figure)};Plotly.newPlot('{name}',f.data,f.layout)"
                        f".then(()=>Plotly.addFrames('{name}',f.frames||[]))")
                output.data["text/html"] = f"<div id='{name}'></div><script>{{{draw}}}</script>"
        cells.append(cell)
    notebook.cells = cells
    return notebook


def title(path):
    "A notebook's title is its first heading."
    return nbformat.read(path, as_version=4).cells[0].source.splitlines()[0].lstrip("# ")


if __name__ == "__main__":
    shutil.rmtree(OUT, ignore_errors=True)
    pages = {path: path.relative_to(ROOT / "nbs").with_suffix(".html")
             for path in sorted(ROOT.glob("nbs/**/*.ipynb")) if ".ipynb_checkpoints" not in path.parts}
    titles = {path: title(path) for path in pages}
    for path, page in pages.items():
        up = "../" * (len(page.parts) - 1)
        body, _ = HTMLExporter(template_name="lab").from_notebook_node(prepared(nbformat.read(path, as_version=4), up))
        links = " · ".join(f"<a href='{up}{other}'>{html.escape(titles[p].split(':')[0])}</a>"
                           for p, other in pages.items())
        body = (body.replace("<head>", f"<head><script src='{up}plotly.min.js'></script>", 1)
                .replace("<main>", NAVIGATION.format(links) + "<main>", 1))
        (OUT / page).parent.mkdir(parents=True, exist_ok=True)
        (OUT / page).write_text(body, encoding="utf-8")
    shutil.copy(Path(plotly.__file__).parent / "package_data" / "plotly.min.js", OUT / "plotly.min.js")
    for document in ("CONTRIBUTING.md", "CHANGELOG.md"): shutil.copy(ROOT / document, OUT / document)
    print(f"{len(pages)} pages in {OUT.relative_to(ROOT)}")
