"""Options that change speed or memory and nothing else; and derivatives of every kind of network."""
import shutil

import pytest
import torch
from torch import nn

from extras import need

need("train", "data", "dev")

from diffusion_papers import genie
from diffusion_papers.core.denoisers import Denoiser
from diffusion_papers.core.diffusion import MODELS, DiffusionConfig, train_denoiser
from diffusion_papers.core.networks import FAMILIES, UNet, unet_config
from diffusion_papers.core.processes import LinearVP
from diffusion_papers.core.samplers import exact_slope, noise_estimate, slope_derivative
from diffusion_papers.topics.shapes_world import SCENES

SMALL = SCENES.override(**{"unet.multipliers": (1, 1), "unet.attention": (), "training.steps": 4, "training.batch_size": 8,
                                     "training.precision": "no"})


def losses(**options):
    found = []
    train_denoiser(SMALL.override(**options), device="cpu", callback=lambda step, loss: found.append(loss))
    return torch.tensor(found)


@pytest.fixture(scope="module")
def plain(): return losses()


@pytest.mark.parametrize("option, tolerance", [
    ({"training.channels_last": True}, 1e-4), ({"unet.checkpointing": True}, 1e-4), ({"training.accumulate": 2}, 1e-4),
    ({"training.precision": "bf16"}, 2e-2)], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_options_leave_the_loss(plain, option, tolerance):
    torch.testing.assert_close(losses(**option), plain, rtol=tolerance, atol=0)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_trains_alike():
    found = {}
    for compiled in (False, True):
        found[compiled] = []
        config = MODELS["digits"].override(**{"mlp.width": 16, "mlp.blocks": 1, "training.steps": 4, "training.compile": compiled})
        train_denoiser(config, device="cpu", callback=lambda step, loss: found[compiled].append(loss))
    assert found[True] == pytest.approx(found[False], rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_derivative_along_the_path_equals_a_difference(family):
    "Acceptance: forward mode against central differences, all families, attention included."
    torch.manual_seed(0)
    config = unet_config(family, image_size=8, width=32, multipliers=(1, 2), blocks=1, attention=(4,))
    network = UNet(config).double()
    for parameter in network.parameters():
        if parameter.ndim > 1: nn.init.normal_(parameter, std=0.5 * parameter[0].numel() ** -0.5)
    denoiser = Denoiser(network, LinearVP(), "eps", label="time")
    x, sigma = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([0.4, 3.0], dtype=torch.float64)
    with torch.no_grad():
        eps, change = exact_slope(denoiser)(x, sigma)
        assert torch.allclose(change, slope_derivative(denoiser, x, sigma, eps))
        epsilon, h = noise_estimate(denoiser), 1e-5
        difference = (epsilon(x + h * eps, sigma + h) - epsilon(x - h * eps, sigma - h)) / (2 * h)
    assert (change - difference).norm() / difference.norm() < 1e-4


@pytest.mark.parametrize("kind", ["classes", "up-sampler"])
def test_models_that_cannot_draw_alone_are_measured_too(kind):
    sizes = dict(image_size=32, width=32, multipliers=(1,), blocks=1, attention=(), head_width=16)
    more = dict(classes=6, null_class=False) if kind == "classes" else dict(conditioning=3, augmented=True)
    diffusion = DiffusionConfig(data="shapes", family="adm", label="time", label_dropout=0.0,
                                low_size=16 if kind == "up-sampler" else 0, unet=unet_config("adm", **sizes, **more))
    config = genie.GenieConfig(diffusion, evaluated=3)
    rows = genie.evaluate(genie.build(config), solvers=("genie", "ddim"), calls=(2,))
    assert len(rows) == 2 and all(row["error"] > 0 and row["frechet"] > 0 for row in rows)


@pytest.mark.parametrize("target", genie.TARGETS)
def test_mixed_precision_leaves_the_target_of_the_head_alone(target):
    "Forward mode does not know autocast, and a difference of rounded answers would be noise."
    model = genie.load_pretrained("genie_shapes")
    x0, sigma = torch.rand(4, *model.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1, torch.full((4,), 2.0)
    silent = lambda x, *rest: torch.zeros_like(x)  # so that the loss is the size of the target
    loss = lambda: genie.distillation_loss(model.denoiser, silent, x0, sigma, torch.ones_like(x0), target=target)
    plain, before = loss(), torch.backends.cudnn.allow_tf32
    with torch.autocast("cpu", torch.bfloat16): mixed = loss()
    assert torch.equal(plain, mixed) and torch.backends.cudnn.allow_tf32 == before
