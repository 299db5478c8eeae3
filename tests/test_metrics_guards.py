"""Measures refuse pictures of another range, before they clip: bytes of 0 to 255 are not a white picture."""
from extras import need

need("train", "data")

import pytest
import torch

from diffusion_papers import genie
from diffusion_papers.workbench.checks import clipped
from diffusion_papers.core.diffusion import MODELS, distance_to_data
from diffusion_papers.core.metrics import (digit_judge, frechet_features, frechet_pixels, inside, moments_of, precision_recall, psnr,
                                           sliced_wasserstein, to_bytes)
from diffusion_papers.workbench.plots import to_pixels
from diffusion_papers.topics.shapes_world import Judge, judged
from diffusion_papers.topics.utility import utility

seeded = lambda: torch.Generator().manual_seed(0)
GOOD = torch.rand(6, 3, 32, 32, generator=seeded()) * 2 - 1
BYTES = (GOOD + 1) * 127.5
SIGNED = GOOD * 128
flat = lambda images: images.flatten(1)
small = lambda images: images[:, :, :4, :4].flatten(1)
MEASURES = {
    "frechet_pixels": ("images_a", lambda images: frechet_pixels(images[:, :, :4, :4], GOOD[:, :, :4, :4])),
    "frechet_pixels, second": ("images_b", lambda images: frechet_pixels(GOOD[:, :, :4, :4], images[:, :, :4, :4])),
    "frechet_features": ("images_a", lambda images: frechet_features(small, images, GOOD)),
    "moments_of": ("images", lambda images: moments_of(small, images).mean.sum()),
    "to_bytes": ("images", to_bytes),
    "judged": ("images", lambda images: judged(Judge(), images)["shape"]),
    "psnr": ("images", lambda images: psnr(images, GOOD)),
    "clipped": ("images", clipped),
}
STRICT = {  # not of samples: no overshoot either
    "psnr, truth": ("truth", lambda images: psnr(GOOD, images)),
    "judge": ("images", lambda images: Judge().features(images)),
    "utility": ("images", lambda images: utility(images, torch.arange(6), {"x0": GOOD, "class_label": torch.arange(6)})),
    "utility, real": ("real", lambda images: utility(GOOD, torch.arange(6), {"x0": images, "class_label": torch.arange(6)})),
}


@pytest.mark.parametrize("wrong", [BYTES, SIGNED, BYTES.double(), BYTES.half()], ids=["bytes", "signed", "float64", "float16"])
@pytest.mark.parametrize("measure", [*MEASURES, *STRICT])
def test_pictures_of_another_range_are_refused(measure, wrong):
    name, function = (MEASURES | STRICT)[measure]
    with pytest.raises(ValueError, match=rf"^{name}.*: expected values (about|in) \[-1, 1\], got \[.*; 8-bit pixels"): function(wrong)


@pytest.mark.parametrize("measure", MEASURES)
def test_an_overshoot_of_samples_is_clipped(measure):
    function = MEASURES[measure][1]
    torch.manual_seed(0); over = function(GOOD * 3)
    torch.manual_seed(0); clean = function((GOOD * 3).clamp(-1, 1))
    assert torch.equal(torch.as_tensor(over), torch.as_tensor(clean))


@pytest.mark.parametrize("measure", [*MEASURES, *STRICT])
def test_whole_numbers_are_refused_by_their_name(measure):
    name, function = (MEASURES | STRICT)[measure]
    with pytest.raises(TypeError, match=f"^{name}.*: expected floating-point values, got torch.uint8"): function(BYTES.to(torch.uint8))


def test_bytes_are_not_shown_as_white():
    with pytest.raises(ValueError, match="images: expected values in .* 8-bit pixels"): to_pixels(BYTES)
    assert to_pixels(100 * GOOD).shape == (6, 32, 32, 3)  # a noisy state has both signs


def test_digits_are_judged_in_their_range():
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match="images: expected values about"): digit_judge().features(torch.full((2, 1, 8, 8), 200.0))


def test_solvers_that_lead_anywhere_are_still_measured():
    "Two steps of Heun's method end far outside of the range: a large distance, not an error."
    model = genie.load_pretrained()
    images = genie.sample(model, 50, solver="heun", calls=4)
    assert images.abs().max() > 8 and distance_to_data(MODELS["digits"])(images) > 0
    assert genie.evaluate(model, 8, solvers=("heun",), calls=(4,))[0]["error"] > 1


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"images: expected the shape of truth, \(6, 3, 32, 32\), got \(6, 1, 32, 32\)"):
        psnr(GOOD[:, :1], GOOD)
    with pytest.raises(ValueError, match="points: expected 7 values a sample"): inside(torch.zeros(5, 3), torch.zeros(5, 7))
    with pytest.raises(ValueError, match="reference: expected at least 2"): precision_recall(torch.zeros(1, 3), torch.zeros(5, 3))
    for empty in (torch.zeros(0, 3), torch.zeros(())):
        with pytest.raises(ValueError, match="samples_b: expected at least one"): sliced_wasserstein(torch.zeros(2, 3), empty, seeded())


def test_half_precision_measures_as_float32():
    points, reference = torch.randn(40, 5, generator=seeded()).half(), torch.randn(50, 5, generator=seeded()).half()
    assert precision_recall(points, reference) == precision_recall(points.float(), reference.float())
    every = torch.arange(256) / 127.5 - 1
    assert torch.equal(to_bytes(every.half().reshape(1, 1, 16, 16), nearest=True).flatten(), torch.arange(256, dtype=torch.uint8))


def test_half_precision_and_mixed_measures_agree():
    half, single = GOOD[:, :, :4, :4].half(), GOOD[:, :, :4, :4]
    assert abs(frechet_pixels(half, single)) < 1e-4 and torch.equal(to_bytes(half), to_bytes(half.float()))
