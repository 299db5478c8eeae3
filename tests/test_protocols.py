"""Published measures: networks as TorchScript, statistics in blocks, and each number against an independent one."""
import os
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from extras import need

need("train", "data")

from PIL import Image
from scipy import linalg
from scipy.stats import wasserstein_distance

from diffusion_papers.core.data import TensorSet
from diffusion_papers.core.generation import generate
from diffusion_papers.core.metrics import Moments
from diffusion_papers.core.protocols import (data_name, fid, load_classifier, load_extractor, load_feature_maps, load_network, model_fid, nearest_preset,
                                             read_moments, real_moments, stored_moments)
from diffusion_papers.evidence import ddo as ddo_evidence
from diffusion_papers.evidence import dpdm as dpdm_evidence
from diffusion_papers.evidence import i2sb as i2sb_evidence


class Means(nn.Module):
    def forward(self, images): return torch.stack([images.double()[:, 0].mean((1, 2)), images.double()[:, 2, 0].mean(1)], 1)


class Squares(nn.Module):
    "Features that tell a mask from its opposite."
    def __init__(self): super().__init__(); self.means = Means()
    def forward(self, images): return torch.cat([self.means(images), self.means(images) ** 2], 1)


class Asked(nn.Module):
    def forward(self, images, return_features: bool=False):
        if return_features: return images.double().mean((2, 3))
        return images.double().sum((1, 2, 3))[:, None]


class Shown(nn.Module):
    "Class 1 where the first pixel of the first channel is above 0.4 of a deviation."
    def forward(self, images):
        assert images.shape[1] == 3 and images.shape[2] == 224 and images.shape[3] == 224
        return torch.stack([torch.full_like(images[:, 0, 0, 0], 0.4), images[:, 0, 0, 0]], 1)


class Two(nn.Module):
    def forward(self, images): return [2 * images, images[:, :, ::2, ::2]]


@pytest.fixture
def script(tmp_path):
    def saved(network, name="network.pt"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.script(network).save(tmp_path / name)
        return tmp_path / name
    return saved


def bytes_of(count, shape=(3, 4, 4), seed=0): return torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def kept(images, folder, **more): return generate(lambda piece: {"images": images[list(piece)], **{name: value[list(piece)] for name, value in more.items()}}, len(images), folder, size=4, device="cpu")


def frechet(a, b):
    "Squared Frechet distance with the root of the product of the covariances."
    a, b = a.numpy(), b.numpy()
    covariances = np.cov(a.T), np.cov(b.T)
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)


def test_fid_is_that_of_the_networks_features(script, tmp_path):
    made, real, network = bytes_of(30), bytes_of(50, seed=1), Means()
    path = script(network)
    reference = real_moments(TensorSet(real / 127.5 - 1), path, cache=tmp_path / "kept", size=7, device="cpu")
    found = fid(kept(made, tmp_path / "made"), path, reference, size=7, device="cpu")
    assert found == pytest.approx(frechet(network(made), network(real)), rel=1e-6)


@pytest.mark.parametrize("scale", [127.5, 3.0])
def test_real_pictures_of_another_range_are_refused(script, tmp_path, scale):
    wrong = TensorSet((bytes_of(6) / 127.5 - 1) * scale)
    with pytest.raises(ValueError, match=r"(data|images): expected values (in|about) \[-1, 1\]"):
        real_moments(wrong, script(Means()), cache=tmp_path / "kept", device="cpu")


def test_grey_pictures_come_in_three_channels_and_features_are_asked_for_by_their_word(script):
    grey = bytes_of(5, (1, 4, 4))
    assert torch.equal(load_extractor(script(Asked()))(grey), grey.double().mean((2, 3)).expand(-1, 3))


def test_a_file_that_is_no_network_is_refused(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "weights.pt")
    (tmp_path / "text.pt").write_text("no network")
    for name in ("weights.pt", "text.pt"):
        with pytest.raises(ValueError, match=f"classifier: .*{name} is no TorchScript file"): load_network(tmp_path / name, name="classifier")
    with pytest.raises(ValueError, match="features: there is no file"): load_network(tmp_path / "none.pt")


def test_a_brought_network_learns_nothing(script):
    network = load_network(script(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))))
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("count, size", [(10, 3), (64, 1), (65, 1), (1000, 3), (200, 250)])
def test_blocks_hold_every_picture_once(count, size, tmp_path):
    seen = []
    def draw(numbers):
        assert 0 < len(numbers) <= size
        seen.extend(numbers)
        return torch.tensor(list(numbers)).reshape(-1, 1).double()
    moments = stored_moments(draw, count, lambda x: torch.cat([x, x ** 2], 1), tmp_path, about={}, size=size, device="cpu")
    assert seen == list(range(count)) and moments.count == count
    values = torch.stack([torch.arange(count).double(), torch.arange(count).double() ** 2], 1)
    assert torch.allclose(moments.covariance, torch.cov(values.T)) and torch.allclose(moments.mean, values.mean(0))
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["moments.safetensors"]


def test_an_interrupted_measurement_goes_on(tmp_path):
    looked, broken = [], True
    def draw(numbers):
        if broken and numbers.start >= 60: raise InterruptedError
        looked.append(numbers.start)
        return torch.tensor(list(numbers)).reshape(-1, 1).double()
    measured = lambda place: stored_moments(draw, 100, lambda x: x, place, about={}, size=1, device="cpu")
    with pytest.raises(InterruptedError): measured(tmp_path / "a")
    before, broken = len(looked), False
    whole = measured(tmp_path / "a")
    assert before == 60 and len(looked) == 100
    other = measured(tmp_path / "b")
    assert torch.equal(whole.total, other.total) and torch.equal(whole.products, other.products)


def test_statistics_of_other_pictures_are_others(script, tmp_path):
    path, data = script(Means()), TensorSet(bytes_of(100) / 127.5 - 1)
    one = real_moments(data, path, cache=tmp_path / "c", device="cpu")
    half = real_moments(data, path, count=50, cache=tmp_path / "c", device="cpu")
    changed = TensorSet(-data.tensors["x0"])
    other = real_moments(changed, path, cache=tmp_path / "c", device="cpu")
    assert (one.count, half.count) == (100, 50) and not torch.equal(one.total, other.total) and len(list((tmp_path / "c").iterdir())) == 3
    assert data_name(data) != data_name(changed) and data_name(data) == data_name(TensorSet(data.tensors["x0"].clone()))


def test_published_statistics_are_read(tmp_path):
    mean, root = torch.randn(3, generator=torch.Generator().manual_seed(0)).double(), torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).double()
    np.savez(tmp_path / "s.npz", mu=mean.numpy(), sigma=(root @ root.T).numpy())
    read = read_moments(tmp_path / "s.npz")
    assert torch.allclose(read.mean, mean) and torch.allclose(read.covariance, root @ root.T)
    Moments(2).add(torch.tensor([[1.0, 2.0], [3.0, 5.0]])).save(tmp_path / "m.safetensors")
    assert read_moments(tmp_path / "m.safetensors").mean.tolist() == [2.0, 3.5]
    with pytest.raises(ValueError, match="statistics: there is no file"): read_moments(tmp_path / "none.npz")


def test_a_model_names_its_data_and_mirrored_ones_count_once(tmp_path, script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for number, pixels in enumerate(bytes_of(6, (8, 8, 3))): Image.fromarray(pixels.numpy()).save(tmp_path / "pictures" / f"{number}.png")
    from diffusion_papers.core.diffusion import DiffusionConfig
    config = DiffusionConfig(data="images", data_path="pictures", mirrored=True).override(**{"family": "ddpm", "unet.image_size": 8})
    made, path, network = bytes_of(9, (3, 8, 8), seed=3), script(Means()), Means()
    real = torch.stack([torch.from_numpy(np.array(Image.open(place))) for place in sorted((tmp_path / "pictures").iterdir())]).permute(0, 3, 1, 2)
    found = model_fid(kept(made, tmp_path / "made"), SimpleNamespace(config=SimpleNamespace(diffusion=config)), path, device="cpu")["fid"]
    assert found == pytest.approx(frechet(network(made), network(real)), rel=1e-6)
    first = model_fid(kept(made, tmp_path / "again"), SimpleNamespace(config=SimpleNamespace(diffusion=config)), path, real=3, device="cpu")["fid"]
    assert first == pytest.approx(frechet(network(made), network(real[:3])), rel=1e-6)


def test_the_nearest_preset_differs_least():
    from diffusion_papers.genie import CONFIGS
    changed = CONFIGS["imagenet64"].override(**{"diffusion.data_path": "/somewhere", "head.steps": 7, "diffusion.unet.width": 32})
    assert nearest_preset(changed, CONFIGS) == "imagenet64" and nearest_preset(CONFIGS["cpu"], CONFIGS) == "cpu"


# ---- what each paper prints

def test_a_classifier_sees_224_normalised_pixels(script, tmp_path):
    levels = torch.tensor([0, 140, 150, 255], dtype=torch.uint8)
    classes = load_classifier(script(Shown()))(levels[:, None, None, None].expand(-1, 3, 8, 8))
    assert classes.tolist() == [int((level / 255 - 0.485) / 0.229 > 0.4) for level in levels.tolist()] == [0, 0, 1, 1]
    made = kept(levels[:, None, None, None].expand(-1, 3, 8, 8).contiguous(), tmp_path / "made", class_label=torch.tensor([0, 0, 1, 0]))
    assert i2sb_evidence.measure_accuracy(made, None, tmp_path / "network.pt", size=3, device="cpu") == {"accuracy": 0.75}
    without = kept(bytes_of(4), tmp_path / "without")
    with pytest.raises(ValueError, match="no classes"): i2sb_evidence.measure_accuracy(without, None, tmp_path / "network.pt", device="cpu")


def test_lpips_is_the_distance_of_unit_features(script, tmp_path, monkeypatch):
    made, clean = bytes_of(5, (3, 8, 8)), bytes_of(5, (3, 8, 8), seed=1)
    monkeypatch.setattr(i2sb_evidence, "test_data", lambda config: TensorSet(clean / 127.5 - 1))
    found = i2sb_evidence.measure_lpips(kept(made, tmp_path / "made"), SimpleNamespace(config=None), script(Two()), size=2, device="cpu")["lpips"]
    a, b = (x.double().numpy() / 127.5 - 1 for x in (made, clean))
    unit = lambda x: x / np.sqrt((x ** 2).sum(1, keepdims=True))
    apart = [((unit(a[:, :, ::step, ::step]) - unit(b[:, :, ::step, ::step])) ** 2).sum(1).mean((1, 2)) for step in (1, 2)]
    assert found == pytest.approx(sum(apart).mean(), rel=1e-4)
    with pytest.raises(ValueError, match="feature maps"): load_feature_maps(script(Means()))(torch.zeros(1, 3, 4, 4))


def test_masks_are_the_insides_of_shapes(script, tmp_path, monkeypatch):
    functions, real = (torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(seed)) + 0.5 for seed in (0, 1))
    made = generate(lambda piece: {"functions": functions[list(piece)]}, 8, tmp_path / "made", size=3, device="cpu")
    monkeypatch.setattr(ddo_evidence, "load_data", lambda config: TensorSet(real))
    monkeypatch.chdir(tmp_path)
    model = SimpleNamespace(config=ddo_evidence.VORTICITY)
    white = lambda x: Squares()((255.0 * (x < 0)).expand(-1, 3, -1, -1))
    assert ddo_evidence.measure_fid(made, model, script(Squares()), device="cpu")["fid"] == pytest.approx(frechet(white(functions), white(real)), rel=1e-6)


def test_phases_are_compared_by_their_circular_moments(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    angles = [torch.rand(6, 5, 5, generator=generator) * wide for wide in (2.0, 4.0)]
    waves = [torch.stack([angle.cos(), angle.sin()], 1) for angle in angles]
    drawn = torch.cat([3 * waves[0], waves[0][:1]])  # of any length, and one that failed at a point
    drawn[-1, 0, 2, 3] = float("nan")
    made = generate(lambda piece: {"functions": drawn[list(piece)]}, 7, tmp_path, size=4, device="cpu")
    monkeypatch.setattr(ddo_evidence, "load_data", lambda config: TensorSet(waves[1]))
    from diffusion_papers.ddo import CONFIGS
    found = ddo_evidence.measure_circular(made, SimpleNamespace(config=CONFIGS["volcano"]), None)
    def moments(angle):
        means = [np.exp(1j * p * angle.double().numpy()).reshape(6, -1).mean(1) for p in (1, 2)]
        return 1 - abs(means[0]), abs(means[1]) * np.sin(np.angle(means[1]) - 2 * np.angle(means[0])) / (1 - abs(means[0])) ** 1.5
    for name, ours, theirs in zip(("variance", "skewness"), *map(moments, angles)): assert found[name] == pytest.approx(wasserstein_distance(ours, theirs), rel=1e-3)
    assert found["dropped"] == 1
    with pytest.raises(ValueError, match="ask for --metric functions"): ddo_evidence.measure_circular(made, SimpleNamespace(config=CONFIGS["cpu"]), None)


def test_classifiers_learn_from_samples_and_are_tried_on_test_pictures(tmp_path, monkeypatch):
    labels = torch.arange(200) % 2
    images = (labels[:, None, None, None] * 200 + bytes_of(200, (1, 8, 8)) // 8).to(torch.uint8)
    made, asked = kept(images, tmp_path / "made", class_label=labels), []
    test = TensorSet(images[:50] / 127.5 - 1, class_label=1 - labels[:50])  # all of them named wrongly
    monkeypatch.setattr(dpdm_evidence, "test_data", lambda config: asked.append(config.data_path) or test)
    seen, learn = [], dpdm_evidence.utility
    monkeypatch.setattr(dpdm_evidence, "utility", lambda images, *rest, **options: seen.append(images) or learn(images, *rest, **options))
    found = dpdm_evidence.measure_classifiers(made, SimpleNamespace(config=dpdm_evidence.DIGITS), None, data_path="there", kinds=("linear",), epochs=20, lr=3e-3, device="cpu")
    assert found == {"linear": 0.0} and asked == ["there"] and torch.allclose(seen[0], images / 127.5 - 1)


def test_a_private_models_fid_is_against_its_training_pictures(script, tmp_path, monkeypatch):
    made, real = bytes_of(9, (1, 4, 4)), bytes_of(12, (1, 4, 4), seed=1)
    monkeypatch.setattr(dpdm_evidence, "load_data", lambda config: TensorSet(real / 127.5 - 1))
    monkeypatch.chdir(tmp_path)
    network = Means()
    three = lambda x: network(x.expand(-1, 3, -1, -1))
    found = dpdm_evidence.measure_fid(kept(made, tmp_path / "made"), SimpleNamespace(config=dpdm_evidence.DIGITS), script(network), device="cpu")["fid"]
    assert found == pytest.approx(frechet(three(made), three(real)), rel=1e-6)


def test_restored_pictures_are_compared_with_a_folder_of_clean_ones(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clean").mkdir()
    for number, pixels in enumerate(bytes_of(6, (4, 4, 3))): Image.fromarray(pixels.numpy()).save(tmp_path / "clean" / f"{number}.png")
    real = torch.stack([torch.from_numpy(np.array(Image.open(place))) for place in sorted((tmp_path / "clean").iterdir())]).permute(0, 3, 1, 2)
    made, network = bytes_of(9, seed=3), Means()
    model = SimpleNamespace(config=SimpleNamespace(data="images", max_pixels=10**6), shape=(3, 4, 4))
    found = i2sb_evidence.measure_fid(kept(made, tmp_path / "made"), model, script(network), reference_path="clean", device="cpu")["fid"]
    assert found == pytest.approx(frechet(network(made), network(real)), rel=1e-6)
    with pytest.raises(ValueError, match="reference_path"): i2sb_evidence.measure_fid(kept(made, tmp_path / "more"), model, tmp_path / "network.pt", device="cpu")


# ---- what was out of reach of the command line

def test_a_bridge_starts_from_the_adm_that_its_configuration_names(tmp_path, monkeypatch):
    from diffusion_papers import i2sb
    from diffusion_papers.core.networks import authors_keys, unet_config
    small = unet_config("adm", embedding="cosines_first", qkv_order="heads_first", image_size=8, width=32, multipliers=(1, 2), blocks=1, attention=())
    config = i2sb.CONFIGS["imagenet256"].override(unet=small, seed=5)
    network = i2sb.build(config.override(seed=1)).network
    torch.save({theirs: network.state_dict()[ours] for ours, theirs in authors_keys(network, "adm")}, tmp_path / "adm.pt")
    monkeypatch.setattr(i2sb, "fit", lambda model, *_, **__: model)
    begun = i2sb.train(config.override(start=str(tmp_path / "adm.pt")), data=TensorSet(torch.zeros(2, 3, 8, 8)))
    assert torch.equal(begun.network.input.weight, network.input.weight)
    assert not torch.equal(i2sb.train(config, data=TensorSet(torch.zeros(2, 3, 8, 8))).network.input.weight, network.input.weight)


def test_a_perceptual_loss_takes_its_features_from_a_file(script):
    from diffusion_papers import dfno
    path, (a, b) = script(Two()), (bytes_of(3, seed=seed) / 127.5 - 1 for seed in (0, 1))
    named = dfno._distance_for(dfno.CONFIGS["cifar10"].override(features=str(path)), None, "cpu")
    assert torch.equal(named(a, b), dfno.perceptual(Two())(a, b))
    moving = a.clone().requires_grad_()
    named(moving, b).sum().backward()
    assert moving.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"features=vgg.pt"): dfno._distance_for(dfno.CONFIGS["cifar10"], None, "cpu")
    with pytest.raises(ValueError, match="features: there is no file"): dfno._distance_for(dfno.CONFIGS["cifar10"].override(features="none.pt"), None, "cpu")


def test_the_cifar_student_is_compared_with_cifar():
    from diffusion_papers import dfno
    assert dfno.CONFIGS["cifar10"].diffusion.data == "cifar10" and dfno.CONFIGS["imagenet64"].diffusion.data == "images"


@pytest.fixture
def mnist(tmp_path):
    "Four files in MNIST's form: a square on black, and one picture that is empty."
    images = np.zeros((4, 28, 28), np.uint8)
    for number in range(3): images[number, 8:20, 6 + number:20] = 255
    for part in ("train", "t10k"):
        for what, content in (("images-idx3", images), ("labels-idx1", np.arange(4, dtype=np.uint8) + 5 * (part == "t10k"))):
            head = bytes([0, 0, 8, content.ndim]) + b"".join(length.to_bytes(4, "big") for length in content.shape)
            (tmp_path / f"{part}-{what}-ubyte").write_bytes(head + content.tobytes())
    return tmp_path


def test_mnists_digits_become_signed_distances(mnist):
    from scipy.ndimage import distance_transform_edt

    from diffusion_papers import ddo
    from diffusion_papers.core.data import idx_folder
    from diffusion_papers.topics.function_data import shape_distances
    with pytest.warns(UserWarning, match="1 of 4 show no shape"): x0 = ddo.load_data(ddo.CONFIGS["mnist_sdf"].override(data_path=str(mnist)))[:]["x0"]
    images = idx_folder(mnist)[:3]["x0"]
    inside = nn.functional.interpolate(images, (32, 32), mode="bilinear")[:, 0].numpy() > 0
    coarse = np.stack([distance_transform_edt(~each) - distance_transform_edt(each) for each in inside]) / 32
    assert x0.shape == (3, 1, 64, 64) and np.allclose(shape_distances(images, 32).numpy(), coarse, atol=1e-5)
    from scipy.fft import dctn
    fine, waves = dctn(x0[:, 0].double().numpy(), axes=(1, 2), norm="ortho"), dctn(coarse, axes=(1, 2), norm="ortho")
    assert np.allclose(fine[:, :32, :32], 2 * waves, atol=1e-4) and abs(fine[:, 32:]).max() < 1e-4 and abs(fine[:, :, 32:]).max() < 1e-4


def test_test_pictures_are_those_of_the_test_files(mnist, tmp_path):
    from diffusion_papers import dpdm
    config = dpdm.CONFIGS["mnist"].override(data_path=str(mnist))
    assert dpdm.load_data(config)[:]["class_label"].tolist() == [0, 1, 2, 3] and dpdm.test_data(config)[:]["class_label"].tolist() == [5, 6, 7, 8]
    (tmp_path / "test_batch.bin").write_bytes(bytes([7]) + bytes(3072))
    assert dpdm.test_data(dpdm.CONFIGS["cifar10"].override(data_path=str(tmp_path)))[:]["class_label"].tolist() == [7]
    with pytest.raises(ValueError, match="none are said to be for tests"): dpdm.test_data(dpdm.CONFIGS["celeba32"].override(data_path=str(tmp_path)))
    with pytest.raises(ValueError, match="t10k-images"): dpdm.test_data(config.override(data_path=str(tmp_path / "nothing")))


def test_functions_come_onto_the_grid_of_the_configuration(tmp_path):
    from diffusion_papers import ddo
    waves = np.exp(1j * np.arange(2 * 128 * 128).reshape(2, 128, 128)).astype(np.complex64)
    np.save(tmp_path / "radar.npy", waves)
    x0 = ddo.load_data(ddo.CONFIGS["volcano60"].override(data_path=str(tmp_path / "radar.npy")))[:]["x0"]
    assert x0.shape == (2, 2, 60, 60) and np.allclose(x0[:, 0].numpy(), waves.real[:, :60, :60], atol=1e-5)
    fields = torch.randn(3, 256, 256, generator=torch.Generator().manual_seed(0))
    torch.save({"x": fields, "y": 2 * fields}, tmp_path / "flow.pt")
    flow = ddo.CONFIGS["navier_stokes"].override(data_path=str(tmp_path / "flow.pt"), data_std=2.0)
    assert torch.equal(ddo.load_data(flow)[:]["x0"][:, 0], 2 * fields[:, ::2, ::2])
    with pytest.warns(UserWarning, match="data_std: these functions have a standard deviation of 2, the configuration says 0.5"): ddo.load_data(flow.override(data_std=0.5))
    for points, told in ((100, "expected a divisor of the data's 256 points, got 100"), (512, "on at least 512 x 512 points, got 256 x 256")):
        with pytest.raises(ValueError, match=told): ddo.load_data(flow.override(points=points))


def test_many_functions_differ_from_piece_to_piece_and_come_on_the_asked_grid(tmp_path):
    from diffusion_papers import ddo
    made = ddo.generate_data(ddo.build(ddo.VORTICITY), tmp_path, count=5, size=2, points=24, calls=3, device="cpu").__getitems__(range(5))["functions"]
    assert made.shape == (5, 1, 24, 24) and len(made.flatten(1).unique(dim=0)) == 5


# ---- as a user types it

def test_samples_in_pieces_and_their_fid_from_the_command_line(script, tmp_path, monkeypatch, capsys):
    from diffusion_papers.__main__ import main
    monkeypatch.chdir(tmp_path)
    network = script(Asked(), "inception.pt")
    draw = ["sample", "genie", "--folder", "made", "--set", "count=12", "calls=2", "size=5"]
    assert main(draw) == 0 and "made: 12 samples" in capsys.readouterr().out
    assert main([*draw, "calls=3"]) == 1 and "holds other samples: about.calls was 2 and is 3" in capsys.readouterr().err
    measure = ["evaluate", "genie", "--metric", "fid", "--features", str(network)]
    assert main([*measure, "--folder", "made", "--output", "row.json"]) == 0
    import json
    row, = json.loads((tmp_path / "row.json").read_text())
    assert (row["metric"], row["samples"], row["preset"], row["published"]) == ("fid", 12, "cpu", "-") and row["fid"] > 0
    assert main([*measure, "--set", "count=12", "calls=2", "size=5", "--output", "again.json"]) == 0
    assert json.loads((tmp_path / "again.json").read_text())[0]["fid"] == pytest.approx(row["fid"], rel=1e-9)
    [folder] = (tmp_path / "runs" / "genie").iterdir()
    stamp = (folder / "000000000.safetensors").stat().st_mtime_ns
    assert main([*measure, "--set", "count=12", "calls=2", "size=5"]) == 0 and (folder / "000000000.safetensors").stat().st_mtime_ns == stamp
    capsys.readouterr()


@pytest.mark.parametrize("words, told", [
    (["evaluate", "genie", "--metric", "fid"], "--features: fid needs a TorchScript file of yours: byte images"),
    (["evaluate", "genie", "--metric", "quality"], "--metric"), (["evaluate", "genie", "--features", "x.pt"], "--features: it belongs to a published measure"),
    (["evaluate", "genie", "--folder", "x"], "--folder: it belongs to a published measure"),
    (["evaluate", "ddo", "--metric", "functions", "--features", "x.pt"], "--features: functions asks no network"),
    (["evaluate", "genie", "--metric", "fid", "--features", "none.pt"], "--features: there is no file none.pt"),
    (["evaluate", "ddo", "--metric", "functions", "--folder", "none"], "--folder: there are no samples in none; draw them by"),
    (["evaluate", "ddo", "--metric", "functions", "--set", "epochs=3"], "--set: this measure takes count"),
    (["evaluate", "ddo", "--metric", "circular", "--set", "count=2", "calls=2"], "--metric functions"),
    (["sample", "genie", "--folder", "made", "--output", "x.png"], "--output: a folder of samples has no such file"),
    (["sample", "genie", "--folder", "made", "--set", "calls=0"], "calls"), (["sample", "dpdm", "--folder", "made", "--set", "solver=rk4"], "solver: expected one of"),
    (["sample", "ddo", "--folder", "made", "--set", "calls=1"], "calls"), (["sample", "i2sb", "--folder", "made", "--set", "calls=5000"], "calls"),
    (["sample", "i2sb", "--folder", "made", "--set", "masks_path=x.npz"], "masks_path: a file of free-form holes is for inpaint-freeform1020")])
def test_mistakes_are_told_in_one_line_and_nothing_is_written(words, told, tmp_path, monkeypatch, capsys):
    from diffusion_papers.__main__ import main
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert told in said[-1] and not (tmp_path / "made").exists() and not list(tmp_path.rglob("*.png"))
