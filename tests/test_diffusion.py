"""What a diffusion model is trained on and told, in plain numbers."""
from dataclasses import replace

from extras import need

need("train", "data")

import pytest
import torch
from torch.nn import functional as F

from diffusion_papers.core import diffusion
from diffusion_papers.core.data import digits
from diffusion_papers.core.denoisers import Denoiser
from diffusion_papers.core.diffusion import (END, MODELS, DiffusionConfig, build_denoiser, conditioning_image, data_images, diffusion_loss,
                                             distance_to_data, load_data, one_each, random_times, reduced, sampling_conditions, train_denoiser,
                                             training_conditions, upsampling_condition)
from diffusion_papers.core.networks import MLPConfig, UNetConfig, unet_config
from diffusion_papers.core.processes import BoundedCosineVP, CosineVP, LinearVP
from diffusion_papers.core.training import Draws, step_seed

SMALL = DiffusionConfig(mlp=MLPConfig(width=8, blocks=1, classes=10))
UPSAMPLER = DiffusionConfig(data="noise", family="ddpm", low_size=4, label_dropout=0.0,
                            unet=unet_config("ddpm", image_size=16, width=32, multipliers=(1,), blocks=1, conditioning=3, augmented=True,
                                             embedding="fourier"),
                            label="time")
draws = lambda seed=0: Draws(torch.Generator().manual_seed(seed))
random = lambda *shape, seed=0: torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("process", [LinearVP(), CosineVP()], ids=lambda process: type(process).__name__)
def test_times_are_uniform_from_the_last_of_sampling_to_the_first(process):
    times = random_times(draws(), torch.zeros(40_000, 1, dtype=torch.float64), process)
    assert END == 1e-3 and times.min() >= END and times.max() <= process.start
    shares = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    assert times.quantile(shares) == pytest.approx(END + (process.start - END) * shares, abs=0.01)


@pytest.mark.parametrize("name, process", [("linear", LinearVP), ("cosine", CosineVP), ("bounded_cosine", BoundedCosineVP)])
def test_a_model_has_the_process_prediction_and_label_of_its_configuration(name, process):
    denoiser = build_denoiser(replace(SMALL, process=name, prediction="eps", label="angle"))
    assert type(denoiser.process) is process and (denoiser.prediction, denoiser.label) == ("eps", "angle") and not denoiser.training
    same, other = build_denoiser(SMALL), build_denoiser(replace(SMALL, seed=1))
    assert torch.equal(same.network.input.weight, denoiser.network.input.weight)
    assert not torch.equal(same.network.input.weight, other.network.input.weight)


# losses

class Answer(torch.nn.Module):
    "A network that remembers what it was asked."
    def __init__(self): super().__init__(); self.weight = torch.nn.Parameter(torch.tensor(0.0))
    def forward(self, x, label, class_label=None): self.asked = x, label, class_label; return 0.5 * x


@pytest.mark.parametrize("pixel_sum", [False, True])
def test_the_loss_is_of_noisy_pictures_at_uniform_times(pixel_sum):
    "With eps as the prediction: the mean, or the sum, of (network(x_t) - eps)^2 over the pixels of each picture."
    config = replace(SMALL, prediction="eps", label="time", pixel_sum=pixel_sum)
    denoiser, x0, again = Denoiser(Answer(), LinearVP(), "eps"), random(5, 1, 2, 3), draws()
    found = diffusion_loss(denoiser, {"x0": x0, "class_label": torch.arange(5)}, draws(), config)
    times = again.uniform(x0, END, 1.0)
    eps = again.normal(x0)
    alpha, sigma = (part(times.double()).float()[:, None, None, None] for part in (denoiser.process.alpha, denoiser.process.sigma))
    x_t = alpha * x0 + sigma * eps
    squares = (0.5 * x_t - eps).square().sum((1, 2, 3))
    torch.testing.assert_close(found, squares if pixel_sum else squares / 6, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(denoiser.network.asked[0], x_t, rtol=1e-4, atol=1e-4)
    assert denoiser.network.asked[1] == pytest.approx(times, abs=1e-5)


def test_the_share_that_is_asked_for_is_shown_without_a_class():
    labels = torch.arange(20_000) % 10
    shown = training_conditions(SMALL, {"x0": torch.zeros(20_000, 1), "class_label": labels}, draws(), LinearVP())["class_label"]
    hidden = shown == 10
    assert hidden.float().mean().item() == pytest.approx(0.3, abs=0.01) and torch.equal(shown[~hidden], labels[~hidden])
    for share in (0.0, 1.0):
        shown = training_conditions(replace(SMALL, label_dropout=share), {"x0": torch.zeros(50, 1), "class_label": labels[:50]}, draws(), LinearVP())
        assert (shown["class_label"] == 10).float().mean() == share
    assert training_conditions(replace(SMALL, mlp=MLPConfig()), {"x0": torch.zeros(2, 1)}, draws(), LinearVP()) == {}


# up-samplers

def test_a_conditioning_image_is_noisy_first_and_large_then():
    low, noise, level = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1), torch.tensor([0.1, 0.7])
    alpha = torch.exp(-0.5 * (0.1 * level + 19.9 * level**2 / 2))
    noisy = alpha[:, None, None, None] * low + (1 - alpha**2).sqrt()[:, None, None, None] * noise
    found = conditioning_image(low, level, noise, LinearVP(), 16)
    torch.testing.assert_close(found, F.interpolate(noisy, scale_factor=4.0, mode="bilinear"), rtol=1e-4, atol=1e-5)


def test_small_versions_are_weighted_means_of_what_is_near():
    "By a triangle that is as wide as two of the small pixels."
    images = random(1, 1, 8, 8)
    weights = torch.tensor([[max(0.0, 1 - abs((i + 0.5) / 2 - (j + 0.5))) for i in range(8)] for j in range(4)])
    weights = weights / weights.sum(1, keepdim=True)
    torch.testing.assert_close(reduced(images, 4)[0, 0], weights @ images[0, 0] @ weights.T)


def test_an_up_sampler_is_trained_on_noisy_small_versions_and_told_how_noisy():
    x0, again = random(3, 3, 16, 16), draws()
    cond = training_conditions(UPSAMPLER, {"x0": x0}, draws(), LinearVP())
    level = again.uniform(x0, END, 1.0)
    low = reduced(x0, 4)
    assert torch.equal(cond["augmentation"], level)
    torch.testing.assert_close(cond["condition"], conditioning_image(low, level, again.normal(low), LinearVP(), 16))


def test_an_up_sampler_is_shown_small_pictures_with_little_noise_in_sampling():
    low = random(2, 3, 4, 4)
    cond = upsampling_condition(low, LinearVP(), 16, seed=3)
    noise = torch.randn(low.shape, generator=torch.Generator().manual_seed(step_seed(3, 1)))
    assert cond["augmentation"].tolist() == pytest.approx([0.1, 0.1])
    torch.testing.assert_close(cond["condition"], conditioning_image(low, torch.tensor([0.1, 0.1]), noise, LinearVP(), 16))
    again = sampling_conditions(UPSAMPLER, torch.zeros(2, 3, 16, 16), LinearVP())
    torch.testing.assert_close(again["condition"], upsampling_condition(reduced(data_images(UPSAMPLER, 2), 4), LinearVP(), 16)["condition"])


def test_classes_come_in_turn_where_a_model_cannot_draw_without():
    unet = unet_config("distillation", image_size=8, width=8, multipliers=(1,), classes=3)
    config = DiffusionConfig(data="noise", family="distillation", label_dropout=0.0, unet=unet)
    assert sampling_conditions(config, torch.zeros(5, 3, 8, 8), LinearVP())["class_label"].tolist() == [0, 1, 2, 0, 1]
    assert sampling_conditions(SMALL, torch.zeros(5, 1, 8, 8), LinearVP()) == {}
    knows_none = DiffusionConfig(data="noise", family="ddpm", unet=UNetConfig(image_size=8, width=32, classes=3))
    assert sampling_conditions(knows_none, torch.zeros(5, 3, 8, 8), LinearVP()) == {}


def test_a_label_for_all_or_one_each():
    assert one_each(3, 4).tolist() == [3, 3, 3, 3] and one_each([1, 0], 2).tolist() == [1, 0]
    for wrong in ([1, 0, 2], 0.5):
        with pytest.raises(ValueError, match="^class_label: expected"): one_each(wrong, 2)


# data

def test_the_first_pictures_are_those_of_the_data():
    assert torch.equal(data_images(SMALL, 5), digits().tensors["x0"][:5]) and len(data_images(SMALL)) == len(load_data(SMALL)) == 1797
    noise = DiffusionConfig(data="noise")
    assert torch.equal(data_images(noise, 3), torch.stack([load_data(noise)[index]["x0"] for index in range(3)]))


def test_mirrored_pictures_of_a_folder_are_there_twice(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for kind in ("a", "b"):
        (tmp_path / kind).mkdir()
        image.fromarray(torch.arange(192, dtype=torch.uint8).reshape(8, 8, 3).numpy()).save(tmp_path / kind / "0.png")
    config = DiffusionConfig(data="images", data_path=str(tmp_path), family="ddpm", label_dropout=0.0,
                             unet=UNetConfig(image_size=8, width=32, classes=2))
    plain, twice = load_data(config), load_data(replace(config, mirrored=True))
    assert (len(plain), len(twice)) == (2, 4) and torch.equal(twice[3]["x0"], plain[1]["x0"].flip(2))
    assert [twice[index]["class_label"] for index in range(4)] == [0, 1, 0, 1]
    with pytest.raises(ValueError, match="^data_path: the data set 'images' is yours to bring"): load_data(replace(config, data_path=""))
    with pytest.raises(ValueError, match="class_label: expected 0 to 0"): load_data(replace(config, unet=replace(config.unet, classes=1)))


def test_training_takes_data_loss_and_seed_from_the_configuration(monkeypatch):
    taken = {}
    def fit(model, loss, data, config, **options):
        taken.update(model=model, loss=loss, data=data, config=config)
        return model
    monkeypatch.setattr(diffusion, "fit", fit)
    config = replace(SMALL, seed=7, pixel_sum=True)
    assert train_denoiser(config) is taken["model"]
    assert taken["config"] == replace(config.training, seed=7) and len(taken["data"]) == 1797 and taken["loss"].keywords == {"config": config}
    assert torch.equal(taken["model"].network.input.weight, build_denoiser(config).network.input.weight)


def test_the_distance_to_the_data_is_0_for_them_and_grows_by_a_shift():
    data, distance = digits().tensors["x0"], distance_to_data(MODELS["digits"])
    assert distance(data) == pytest.approx(0, abs=1e-6)
    darker = data * 0.5
    mean, spread = data.flatten(1).double().mean(0), data.flatten(1).double()
    assert distance(darker) == pytest.approx((0.25 * mean.square().sum() + 0.25 * spread.T.cov().trace()).item(), rel=1e-3)
    assert distance(5 * data.clamp(-0.3, 0.3)) == pytest.approx(distance((5 * data.clamp(-0.3, 0.3)).clamp(-1, 1)))
    large = replace(MODELS["digits"], mlp=MLPConfig(shape=(1, 33, 33)))
    assert distance_to_data(large)(data) is None
