"""JupyterLab in a real browser: each paper's notebook is run up to its first control, which is moved by keyboard and by mouse."""
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from test_site import BROWSER, QUIET

ROOT = Path(__file__).resolve().parents[1]
PAPERS = sorted((ROOT / "nbs" / "papers").glob("*.ipynb"))
SCREENS = ROOT / "_out" / "screens"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A running JupyterLab on copies of the notebooks: its address and its folder."
    if not BROWSER: pytest.skip("no browser here: install Debian's chromium")
    pytest.importorskip("playwright.sync_api", reason="the extra 'browser' is not installed")
    folder = tmp_path_factory.mktemp("lab")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
             "--ServerApp.token=", "--ServerApp.password=", f"--ServerApp.root_dir={folder}", "--LabApp.news_url=",
             "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(words, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    address = f"http://127.0.0.1:{port}/"
    for _ in range(120):
        try: urllib.request.urlopen(address + "api", timeout=2); break
        except OSError: time.sleep(0.5)
    else: pytest.fail((folder / "log").read_text()[-2000:])
    yield address, folder
    server.terminate()
    server.wait(20)


def up_to_the_first_control(path):
    "The cells of a notebook up to the first that calls `explore`."
    notebook = json.loads(path.read_text())
    last = next(number for number, cell in enumerate(notebook["cells"])
                if cell["cell_type"] == "code" and "explore(" in "".join(cell["source"]) and cell["outputs"])
    notebook["cells"] = notebook["cells"][:last + 1]
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code": cell["outputs"] = []
    return notebook


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_the_first_control_of_a_paper_works(lab, path):
    from playwright.sync_api import sync_playwright
    address, folder = lab
    (folder / path.name).write_text(json.dumps(up_to_the_first_control(path)))
    with sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=BROWSER, args=QUIET)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(f"{address}lab/tree/{path.name}?reset", wait_until="load")
        page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=60_000)
        asked = page.locator(".jp-Dialog .jp-mod-accept")  # for a kernel, where none has been chosen before
        asked.or_(page.get_by_text("| Idle")).first.wait_for(timeout=60_000)
        if asked.is_visible(): asked.click()
        page.get_by_text("| Idle").wait_for(timeout=60_000)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        page.wait_for_selector(".jp-OutputArea .widget-slider .noUi-handle", timeout=180_000)
        page.wait_for_selector(".jp-OutputArea .js-plotly-plot .main-svg", timeout=60_000)
        handle, shown = page.locator(".noUi-handle").first, page.locator(".widget-readout").first
        look = lambda: page.locator(".js-plotly-plot").first.evaluate("plot => plot.innerHTML")
        handle.scroll_into_view_if_needed()

        def changed(move):
            "Whether the value and the picture are others after a move."
            value, picture = shown.inner_text(), look()
            move()
            for _ in range(100):
                if shown.inner_text() != value and look() != picture: return True
                page.wait_for_timeout(200)
            return False

        def by_keyboard():
            handle.focus()
            page.keyboard.press("ArrowLeft" if handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax") else "ArrowRight")

        def by_mouse():
            line = page.locator(".noUi-base").first.bounding_box()
            at = handle.bounding_box()["x"] < line["x"] + line["width"] / 2
            page.mouse.click(line["x"] + line["width"] * (0.9 if at else 0.1), line["y"] + line["height"] / 2)

        keyboard, mouse = changed(by_keyboard), changed(by_mouse)
        SCREENS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENS / f"lab_{path.stem}.png")
        browser.close()
    assert keyboard and mouse
