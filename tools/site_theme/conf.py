"""Configuration of Sphinx for the site; `tools/site.py` makes the pages and calls it."""
project = "diffusion_papers"
author = "The diffusion_papers authors"
copyright = "2026 onwards, the diffusion_papers authors"
language = "en"

extensions = ["myst_nb", "sphinx-mathjax-offline"]
source_suffix = {".ipynb": "myst-nb", ".md": "myst-nb"}
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"   # outputs are those that the checks have compared
nb_ipywidgets_js = {}       # a page has no kernel, and loads nothing from elsewhere
nb_merge_streams = True
nb_render_markdown_format = "myst"  # tables that cells make, too
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header"]
mathjax3_config = {"options": {"enableMenu": False}}

html_theme = "sphinx_book_theme"
html_title = "diffusion_papers"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = [("figures.js", {"defer": "defer"})]
html_context = {"default_mode": "auto"}
html_favicon = "_static/favicon.svg"
html_copy_source = False
html_use_index = False        # the reference is pages, and an index of them would be empty
html_show_sphinx = False
html_theme_options = {
    "navbar_start": [], "navbar_center": [], "navbar_end": [], "navbar_persistent": [],  # all of it is at the side
    "navigation_with_keys": True,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,   # each page links its own notebook
    "use_fullscreen_button": False,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
