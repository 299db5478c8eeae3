"""What pip needs to know, read from settings.ini (which alone holds the package's metadata)."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

settings = ConfigParser(delimiters=["="])
settings.read("settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]

# Every NAME_requirements is an extra NAME; `all` is what a user may want, `dev` also builds and checks; `bench` is for timings
# alone, `browser` for looking at the site,
# `faces` for experiments on real videos, `text` for captions of one's own (90 MB of weights), `datasets` for training on pictures and captions of one's own.
extras = {key.removesuffix("_requirements"): value.split() for key, value in cfg.items() if key.endswith("_requirements")}
extras["all"] = sorted({package for name, packages in extras.items() if name not in ("dev", "bench", "docs", "browser", "faces", "text", "datasets") for package in packages})
extras["dev"] = extras["dev"] + extras["docs"] + extras["all"]

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], license="Apache-2.0",
    author=cfg["author"], author_email=cfg["author_email"], url=cfg["git_url"], keywords=cfg["keywords"].split(),
    long_description=Path("README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    python_requires=">=" + cfg["min_python"], install_requires=cfg["requirements"].split(), extras_require=extras,
    packages=find_packages(include=["diffusion_papers*"]),
    # A wheel carries the shipped checkpoints and results beside the package: `data/` becomes `share/diffusion_papers/`.
    data_files=[(f"share/diffusion_papers/{folder.name}", [str(file) for file in sorted(folder.glob("*.*")) if file.is_file()])
                for folder in sorted(Path("data").glob("*")) if folder.is_dir() and folder.name != "big"],
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": ["diffusion_papers=diffusion_papers._modidx:d"]},
)
