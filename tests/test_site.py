"""The site, as it is built: its links and pictures; and in a real browser, where there is one: every page, every figure, search, accessibility."""
import functools
import gzip
import http.server
import io
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest

from extras import need

need("data", "dev")

from PIL import Image

from diffusion_papers.workbench.registry import in_the_making, paper

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "_docs"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


class Page(HTMLParser):
    "What a page links to, loads, shows and says outside of code."
    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.anchors, self.pictures, self.text, self.inside = [], [], set(), [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if "id" in values: self.anchors.add(values["id"])
        if tag == "a" and values.get("href"): self.links.append(values["href"])
        if tag in ("script", "img") and values.get("src"): self.loads.append(values["src"])
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload"): self.loads.append(values["href"])
        if tag == "img": self.pictures.append(values.get("alt", ""))
        if tag in ("pre", "code", "script", "style", "span", "div"):
            if tag in ("pre", "code", "script", "style") or "math" in (values.get("class") or "").split(): self.inside.append(tag)
            elif self.inside: self.inside.append(tag)

    def handle_endtag(self, tag):
        if self.inside and tag == self.inside[-1]: self.inside.pop()

    def handle_data(self, data):
        if not self.inside: self.text.append(data)


@pytest.fixture(scope="module")
def pages():
    "The site, built now: path of a page below it -> what is in it."
    pytest.importorskip("myst_nb", reason="the extra 'docs' is not installed")
    done = subprocess.run([sys.executable, "tools/site.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return {path.relative_to(SITE).as_posix(): Page(path.read_text(encoding="utf-8")) for path in sorted(SITE.rglob("*.html"))
            if "_static" not in path.parts}


def test_every_notebook_has_a_page_with_its_file_to_download(pages):
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        if ".ipynb_checkpoints" in path.parts: continue
        place = path.relative_to(ROOT / "nbs").as_posix()
        assert place.replace(".ipynb", ".html") in pages
        assert (SITE / "_static" / "notebooks" / place).read_bytes() == path.read_bytes()


def test_links_lead_somewhere_and_nothing_is_loaded_from_elsewhere(pages):
    broken, away = [], []
    for name, page in pages.items():
        away += [(name, load) for load in page.loads if re.match(r"(https?:)?//", load)]
        for link in page.links + page.loads:
            if re.match(r"(https?:)?//|mailto:|data:|javascript:", link): continue
            place, anchor = urldefrag(urljoin(f"/{name}", link))
            target = unquote(place).lstrip("/").split("?")[0] or "index.html"
            if not (SITE / target).is_file(): broken.append((name, link))
            elif anchor and target in pages and unquote(anchor) not in pages[target].anchors: broken.append((name, link))
    assert not away and not broken


def test_pictures_have_words_and_formulas_no_dollars(pages):
    assert [name for name, page in pages.items() for alt in page.pictures if not alt.strip() or alt.startswith(("../", "_images"))] == []
    assert [(name, found[0]) for name, page in pages.items() if (found := re.findall(r"\$[^$\n]{1,80}\$", " ".join(page.text)))] == []


def test_pages_are_light(pages):
    assert {name: size for name in pages if (size := (SITE / name).stat().st_size) > 5e6} == {}


def test_first_page_waits_for_little(pages):
    "What a browser must have before it shows a word: in one more request each, and small when compressed."
    text = (SITE / "index.html").read_text(encoding="utf-8")
    styles = re.findall(r'<link(?=[^>]*rel="stylesheet")[^>]*href="([^"?]+)', text)
    scripts = re.findall(r'<script(?! defer)[^>]*src="([^"?]+)', text)
    needed = {name: (SITE / name).read_bytes() for name in ("index.html", *styles, *scripts)}
    assert len(styles) > 4 and not scripts and not [name for name in styles if b"@import" in needed[name]]
    assert sum(len(gzip.compress(content)) for content in needed.values()) < 120_000


def test_the_left_column_is_a_table_of_contents_and_the_readme_agrees(pages):
    column = re.search(r'<nav class="bd-links.*?</nav>', (SITE / "index.html").read_text(encoding="utf-8"), re.DOTALL)[0]
    assert re.findall(r'caption-text">([^<]+)<', column) == ["Papers", "Topics", "Core", "Workbench", "Reference"]
    listed = re.findall(r'href="((?:papers|topics|core|workbench)/\d\d_\w+)\.html"', column)
    told = re.findall(r"^\| \[[^\]]+\]\(nbs/((?:papers|topics|core|workbench)/\d\d_\w+)\.ipynb\)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == told and len(told) > 35
    for page in told:
        if page.startswith("papers/") and not in_the_making(paper(page[len("papers/00_"):])): assert page.replace("papers/", "evidence/") + ".html" in column or page.replace("papers/", "evidence/") + ".html" in pages


def test_tables_are_tables(pages):
    assert [name for name in pages if re.search(r"<p>\s*\|", (SITE / name).read_text(encoding="utf-8"))] == []


def test_papers_begin_with_what_moves(pages):
    for name in pages:
        if name.startswith("papers/"):
            text = (SITE / name).read_text(encoding="utf-8")
            assert 0 < text.index("figure-first") < text.index('<section id="at-a-glance">')
            assert text.count('"sliders"') >= 3  # the first picture twice, and another


@pytest.fixture(scope="module")
def browser(pages):
    "A browser, the address of the site, and the words for what went wrong on a page."
    if not BROWSER: pytest.skip("no browser here: install Debian's chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="the extra 'browser' is not installed")
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with playwright.sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=BROWSER, args=QUIET)
        yield chromium, f"http://127.0.0.1:{server.server_address[1]}/"
        chromium.close()
    server.shutdown()


def opened(chromium, address, name, faults, **how):
    "A page that has loaded; what goes wrong is noted."
    page = chromium.new_page(viewport={"width": 1280, "height": 900}, **how)
    page.on("console", lambda message: faults.append((name, message.text)) if message.type == "error" else None)
    page.on("pageerror", lambda error: faults.append((name, str(error))))
    page.on("requestfailed", lambda request: faults.append((name, request.url)))
    page.on("response", lambda response: faults.append((name, response.url)) if response.status >= 400 else None)
    page.on("request", lambda request: faults.append((name, "away: " + request.url))
            if not request.url.startswith((address, "data:", "blob:")) else None)
    page.goto(address + name, wait_until="load")
    return page


def test_every_page_opens_without_a_fault_and_its_figures_move(pages, browser):
    sync_api = pytest.importorskip("playwright.sync_api")
    faults, still, wide = [], [], []
    for name in pages:
        page = opened(*browser, name, faults)
        if "math" in (SITE / name).read_text(encoding="utf-8"):
            page.wait_for_function("() => !document.querySelector('.math') || document.querySelector('mjx-container')", timeout=20_000)
        for place in page.query_selector_all(".figure-place"):
            place.scroll_into_view_if_needed()
            identity = place.get_attribute("id")
            page.wait_for_selector(f"#{identity}[data-drawn=yes] .main-svg", timeout=20_000)
            low, high = zip(*Image.open(io.BytesIO(place.screenshot())).convert("RGB").getextrema())
            if max(high) - min(low) < 30: still.append((name, identity, "blank"))
            for control in page.query_selector_all(f"#{identity} + .figure-controls :is(input, select)"):
                look, changed = f"() => document.getElementById('{identity}').innerHTML", False
                before = page.evaluate(look)
                control.focus()
                for key in ("Home", "End"):  # some entries of a menu show the same, and so do all where a slider stands at its start
                    page.keyboard.press(key)
                    page.wait_for_timeout(500)
                    changed = changed or page.evaluate(look) != before
                if not changed: still.append((name, identity, control.evaluate("c => c.tagName")))
        page.set_viewport_size({"width": 390, "height": 844})  # a phone
        try: page.wait_for_function("() => document.documentElement.scrollWidth <= 390", timeout=3000)  # figures follow a moment later
        except sync_api.TimeoutError: wide.append(name)
        page.close()
    assert not faults and not still and not wide


def test_search_finds_what_one_looks_for(browser):
    faults = []
    for word in ("bridge", "Fourier", "privacy"):
        page = opened(*browser, f"search.html?q={word}", faults)
        page.wait_for_selector("#search-results li a", timeout=20_000)
        page.close()
    assert not faults


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_problem_of_accessibility(pages, browser, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the extra 'browser' is not installed").Axe()
    found = {}
    for name in pages:
        page = opened(*browser, name, [], color_scheme=scheme)
        for place in page.query_selector_all(".figure-place"): place.scroll_into_view_if_needed()
        for problem in axe.run(page, options={"resultTypes": ["violations"], "preload": False}).response["violations"]:
            if problem["impact"] in ("serious", "critical"):
                found.setdefault(problem["id"], []).append((name, problem["nodes"][0]["html"][:150], len(problem["nodes"])))
        page.close()
    assert not found, "\n".join(f"{problem}: {places[:3]}" for problem, places in found.items())
