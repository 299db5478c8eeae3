"""The skeleton of a paper, `make paper SLUG=name [NUMBER=11]`: two notebooks that run, to be filled with the paper.

The skeleton is a whole small paper in the making: a diffusion model of digits that trains, samples, is measured, and has evidence.
Every command and every check works on it from the first minute, and says what is still missing.
"""
import re
import sys
from pathlib import Path

import jupytext
import nbformat

from diffusion_papers.workbench.files import whole_file

ROOT = Path(__file__).resolve().parents[1]
KERNEL = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}


def taken():
    "The numbers and names of the papers that are there."
    return {path.stem[3:]: int(path.stem[:2]) for path in (ROOT / "nbs" / "papers").glob("[0-9][0-9]_*.ipynb")}


def skeleton(kind, slug, number):
    "A notebook of the skeleton, with the paper's names in it."
    text = (ROOT / "tools" / "skeleton" / f"{kind}.py").read_text(encoding="utf-8")
    for place, word in {"NUMBER": number, "SLUG": slug, "CLASS": slug.capitalize(), "NAME": slug.upper()}.items(): text = text.replace(place, word)
    notebook = jupytext.reads(text, "py:percent")
    notebook.metadata = nbformat.from_dict(KERNEL)
    return notebook


def write_skeleton(
    slug: str,               # name of the module
    number: int | None=None, # of the notebooks; None is the next free one
) -> list[Path]:             # the two notebooks
    "Write the notebooks of a new paper (`ValueError` where the name or the number cannot be had; nothing is written then)."
    papers = taken()
    if not re.fullmatch(r"[a-z][a-z0-9_]*", slug): raise ValueError(f"SLUG: expected a lower-case name of a module, got {slug!r}")
    if slug in papers or (ROOT / "diffusion_papers" / slug).exists(): raise ValueError(f"SLUG: {slug} is there already")
    number = max(papers.values(), default=0) + 1 if number is None else number
    if not 0 < number < 100 or number in papers.values(): raise ValueError(f"NUMBER: expected a free one from 1 to 99, got {number}")
    written = [ROOT / "nbs" / shelf / f"{number:02d}_{slug}.ipynb" for shelf in ("papers", "evidence")]
    for kind, path in zip(("paper", "evidence"), written):
        with whole_file(path) as unfinished: nbformat.write(skeleton(kind, slug, f"{number:02d}"), unfinished)
    return written


if __name__ == "__main__":
    try: paths = write_skeleton(sys.argv[1], *map(int, sys.argv[2:3]))
    except (IndexError, ValueError) as error: sys.exit(f"error: {error if len(sys.argv) > 1 else 'say which: make paper SLUG=name'}")
    names = [path.relative_to(ROOT).as_posix() for path in paths]
    print(f"{' and '.join(names)}: now\n    make notebooks NB='{' '.join(names)}'")
