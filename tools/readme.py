"""README.md from nbs/index.ipynb: hidden cells and hidden sources are left out, links are made relative to the top folder, pictures become files."""
import base64
import posixpath
import re
from pathlib import Path

import nbformat

from diffusion_papers.workbench.files import whole_file

ROOT = Path(__file__).resolve().parents[1]


def rebased(text):
    "Links that are relative to nbs/ as links that are relative to the top folder."
    def link(found):
        target = found[1]
        if not re.match(r"[a-z]+:|#", target):
            target = posixpath.normpath(posixpath.join("nbs", target))
            if not (ROOT / target).exists() and (ROOT / f"{target}.md").exists(): target += ".md"
        return f"]({target})"
    return re.sub(r"\]\(([^)\s]+)\)", link, text)


def rendered(cell, number, before):
    "One cell as Markdown; the last paragraph of the text before it describes its picture."
    if cell.cell_type == "markdown": return rebased(cell.source)
    if cell.source.startswith("#| hide"): return ""
    parts = [] if "#| echo: false" in cell.source else [f"```python\n{cell.source}\n```"]
    for output in cell.outputs:
        if "text/markdown" in output.get("data", {}): parts.append(rebased(output.data["text/markdown"]))
        elif "text" in output: parts.append(f"```\n{output.text.rstrip()}\n```")
        elif "image/png" in output.get("data", {}):
            picture = ROOT / "nbs" / "images" / f"index_{number}.png"
            with whole_file(picture) as unfinished: unfinished.write_bytes(base64.b64decode(output.data["image/png"]))
            parts.append(f"![{before.strip().splitlines()[-1]}](nbs/images/{picture.name})")
    return "\n\n".join(parts)


if __name__ == "__main__":
    cells = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4).cells
    parts, before = [], ""
    for number, cell in enumerate(cells):
        parts.append(rendered(cell, number, before).strip())
        if cell.cell_type == "markdown": before = cell.source
    text = "\n\n".join(filter(None, parts))
    with whole_file(ROOT / "README.md") as unfinished: unfinished.write_text(text + "\n", encoding="utf-8")
