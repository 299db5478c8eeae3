"""I2SB: the authors' names and files, and what the notebook's cells do not try: kills, processes, mixtures, every task."""
import datetime
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from extras import need

need("train", "data")

from PIL import Image

from test_distributed import trained_by_command

from diffusion_papers import i2sb
from diffusion_papers.__main__ import main
from diffusion_papers.workbench.checkpoints import CheckpointError
from diffusion_papers.core.data import digits
from diffusion_papers.core.networks import FilmConfig, authors_keys
from diffusion_papers.core.training import Draws
from diffusion_papers.topics.corruptions import TASKS, degrade, reduced_and_repeated
from diffusion_papers.topics.large_pictures import room, stretches

SMALL = i2sb.CONFIGS["cpu"].override(**{"film.width": 8, "training.steps": 12, "training.batch_size": 8, "training.checkpoint_every": 3})
TINY = i2sb.CONFIGS["imagenet256"].override(**{"unet.image_size": 16, "unet.width": 32, "unet.multipliers": (1, 2), "unet.blocks": 1,
                                               "unet.attention": (8,), "unet.head_width": 32})
MANIFESTS = Path(__file__).parent / "manifests"


@pytest.mark.parametrize("preset, manifest, count", [("imagenet256", "i2sb-adm256-uncond-3ch", 552_807_171),
                                                     ("imagenet256_cond", "i2sb-adm256-cond-6ch", 552_814_083)])
def test_published_networks_have_the_authors_tensors(preset, manifest, count):
    with torch.device("meta"): network = i2sb.build(i2sb.CONFIGS[preset]).network
    expected = {name.removeprefix("diffusion_model."): shape for name, shape in json.loads((MANIFESTS / f"{manifest}.json").read_text()).items()}
    state, pairs = network.state_dict(), authors_keys(network, "adm")
    assert [theirs for _, theirs in pairs] == list(expected)
    assert {theirs: list(state[ours].shape) for ours, theirs in pairs} == expected
    assert sum(p.numel() for p in network.parameters()) == count


def authors_file(path, **changes):
    "A checkpoint in the authors' layout."
    network = i2sb.build(TINY).network
    theirs = {f"diffusion_model.{name}": network.state_dict()[ours] for ours, name in authors_keys(network, "adm")}
    content = {"net": theirs, "optimizer": {}, "sched": {},
               "ema": {"decay": 0.99, "num_updates": 1, "shadow_params": list(theirs.values()), "collected_params": []}} | changes
    torch.save(content, path)
    return list(theirs), network


def test_an_average_whose_entries_changed_places_is_refused_by_name(tmp_path):
    names, _ = authors_file(tmp_path / "latest.pt")
    content = torch.load(tmp_path / "latest.pt", weights_only=True)
    shadow = content["ema"]["shadow_params"]
    first, second = next((i, j) for i in range(len(shadow)) for j in range(i) if shadow[i].shape != shadow[j].shape)
    shadow[first], shadow[second] = shadow[second], shadow[first]
    torch.save(content, tmp_path / "swapped.pt")
    with pytest.raises(CheckpointError, match="swapped.pt: wrong shapes: "): i2sb.load_authors_checkpoint(tmp_path / "swapped.pt", "jpeg-5", TINY)
    content["ema"]["shadow_params"] = shadow[:-1]
    torch.save(content, tmp_path / "short.pt")
    with pytest.raises(CheckpointError, match=f"expected an average of {len(names)} tensors"):
        i2sb.load_authors_checkpoint(tmp_path / "short.pt", "jpeg-5", TINY)


def test_a_file_of_another_kind_is_refused(tmp_path):
    for name, content in (("plain", {"a": torch.ones(2)}), ("list", [1, 2]), ("number", torch.ones(3))):
        torch.save(content, tmp_path / f"{name}.pt")
        with pytest.raises(CheckpointError, match=f"{name}.pt"): i2sb.load_authors_checkpoint(tmp_path / f"{name}.pt", "jpeg-5", TINY)
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 half of a file")
    with pytest.raises(CheckpointError, match="cut.pt"): i2sb.load_authors_checkpoint(tmp_path / "cut.pt", "jpeg-5", TINY)


def test_adm_without_the_right_rows_is_refused(tmp_path):
    _, network = authors_file(tmp_path / "latest.pt")
    state = {name: network.state_dict()[ours] for ours, name in authors_keys(network, "adm")}
    torch.save(state | {"out.2.weight": torch.zeros(5, 32, 3, 3), "out.2.bias": torch.zeros(5)}, tmp_path / "adm.pt")
    with pytest.raises(CheckpointError, match="adm.pt: wrong shapes: output"): i2sb.from_adm(tmp_path / "adm.pt", TINY)


def test_chained_steps_have_the_spread_of_the_bridge():
    schedule, clean, generator = i2sb.bridge_schedule(), torch.zeros(20_000, dtype=torch.float64), torch.Generator().manual_seed(0)
    x = torch.ones(20_000, dtype=torch.float64)
    for now in range(999, 499, -1):
        of_x0, of_x, variance = i2sb.posterior(schedule, now, now - 1)
        x = of_x0 * clean + of_x * x + variance**0.5 * torch.randn(len(x), generator=generator, dtype=torch.float64)
    here, end = schedule.forward[499], schedule.forward[999]
    assert abs(x.std() / (here * (1 - (here / end) ** 2).sqrt()) - 1) < 0.02


@pytest.mark.parametrize("task", list(TASKS))
@pytest.mark.parametrize("conditional", [False, True])
def test_every_task_trains_and_restores(task, conditional):
    size, channels = (16, 3)
    config = replace(SMALL, task=task, conditional=conditional, data="shapes", film=FilmConfig(channels, size, 8, (1,)))
    config = config.override(**{"training.steps": 2, "training.batch_size": 4})
    model = i2sb.train(config, device="cpu")
    x0 = i2sb.load_data(config).__getitems__([0, 1])["x0"]
    x1, mask = degrade(x0, task, Draws(torch.Generator().manual_seed(0)))
    restored = i2sb.restore_images(model, x1, mask, calls=3)
    assert restored.shape == x0.shape and torch.isfinite(restored).all()
    if task.startswith("inpaint"): assert torch.equal(restored[mask.expand_as(x0) == 0], x0[mask.expand_as(x0) == 0])
    else: assert (mask == 1).all() and not torch.equal(x1, x0)


def test_a_mixture_gives_every_image_one_of_its_tasks():
    x0 = i2sb.load_data(replace(SMALL, data="shapes", film=FilmConfig(3, 16))).__getitems__(list(range(60)))["x0"]
    x1, mask = degrade(x0, "sr4x-pool+inpaint-center", Draws(torch.Generator().manual_seed(0)))
    holes = (mask == 0).flatten(1).any(1)
    assert 15 < holes.sum() < 45
    pooled = reduced_and_repeated(x0)
    assert torch.equal(x1[~holes], pooled[~holes]) and torch.equal(x1[holes][..., :4, :], x0[holes][..., :4, :])


def test_noise_at_the_start_and_the_ways_of_the_bridge_differ():
    x0 = digits("test").tensors["x0"][:3]
    x1, mask = degrade(x0, "sr2x-pool", Draws(torch.Generator().manual_seed(0)))
    torch.manual_seed(0)
    config = SMALL.override(task="sr2x-pool")
    results = [i2sb.restore_images(i2sb.build(replace(config, **changes)), x1, seed=seed, calls=4) for seed in (0, 1)
               for changes in ({"path": "deterministic"}, {"path": "stochastic"}, {"path": "deterministic", "noisy_start": True})]
    assert torch.equal(results[0], results[3])  # without noise no seed matters
    assert not torch.equal(results[1], results[4]) and not torch.equal(results[2], results[5])


@pytest.mark.parametrize("method", i2sb.METHODS)
def test_an_interrupted_training_is_resumed_to_the_same_bits(tmp_path, method):
    class Stop(Exception): pass
    def stop(step, loss):
        if step == 7: raise Stop
    config = replace(SMALL, method=method)
    with pytest.raises(Stop): i2sb.train(config, tmp_path / "run", device="cpu", callback=stop)
    resumed = i2sb.train(config, tmp_path / "run", resume=True, device="cpu")
    whole = i2sb.train(config, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), whole.state_dict().values()))


PICTURES = i2sb.CONFIGS["cpu"].override(task="jpeg+inpaint", data="photographs", **{"film.channels": 3, "film.width": 8, "film.dilations": (1,)})


@pytest.mark.parametrize("conditional", [False, True])
def test_a_picture_is_restored_alike_in_one_piece_and_in_squares(conditional):
    "A network of 1x1 convolutions and no norm sees nothing but a pixel, so that squares must not matter."
    model = i2sb.build(replace(PICTURES, conditional=conditional, path="deterministic"))
    pixelwise = torch.nn.Conv2d(6 if conditional else 3, 3, 1)
    model.network.forward = lambda x, label, condition=None: pixelwise(x if condition is None else torch.cat([x, condition], 1))
    picture = torch.rand(3, 70, 45) * 2 - 1
    one, many = (i2sb.restore(picture, "jpeg", model=model, calls=3, tile=tile, progress=False) for tile in (128, 32))
    assert one.shape == picture.shape and (one - many).abs().max() < 1e-5


@pytest.mark.parametrize("overlap", [0, 16])
def test_a_picture_is_restored_alike_in_one_go_and_in_pieces(overlap):
    "With noise and a hole: what a piece draws depends on the place alone, and the pieces' weights sum to one."
    model = i2sb.build(PICTURES)
    pixelwise = torch.nn.Conv2d(3, 3, 1)
    model.network.forward = lambda x, label, condition=None: pixelwise(x)
    picture, mask = torch.rand(3, 150, 210) * 2 - 1, torch.zeros(150, 210)
    mask[40:110, 30:180] = 1
    one, many = (i2sb.restore(picture, "inpaint", mask, model=model, calls=4, tile=32, overlap=overlap, piece=piece, progress=False)
                 for piece in (1000, 100))
    assert len(stretches(room(210, 32, overlap), 32, overlap, 100)) > 2
    assert (one - many).abs().max() < 1e-5 and torch.equal(many[:, mask == 0], picture[:, mask == 0])


@pytest.mark.parametrize("side,tile,overlap,longest", [(64, 64, 16, 64), (65, 64, 16, 1), (1000, 64, 0, 200), (3000, 128, 112, 1024), (112, 64, 16, 112)])
def test_stretches_cover_a_side_and_share_two_squares(side, tile, overlap, longest):
    side = room(side, tile, overlap)
    found, total = stretches(side, tile, overlap, longest), torch.zeros(side)
    for start, stop, weight in found:
        assert start % (tile - overlap) == 0 and (stop - start - overlap) % (tile - overlap) == 0 and (weight >= 0).all()
        total[start:stop] += weight
    assert (total - 1).abs().max() < 1e-6 and found[-1][1] == side
    assert all(before[1] - after[0] >= 2 * (tile - overlap) for before, after in zip(found, found[1:]))


def test_around_a_hole_a_picture_stays_as_it_is(tmp_path):
    picture, mask = torch.rand(3, 40, 50) * 2 - 1, torch.zeros(40, 50)
    mask[10:20, 5:30] = 1
    Image.fromarray((255 * mask).byte().numpy()).save(tmp_path / "mask.png")
    model = i2sb.build(PICTURES)
    restored = i2sb.restore(picture, "inpaint", tmp_path / "mask.png", model=model, calls=2, progress=False, seed=3)
    assert torch.equal(restored[:, mask == 0], picture[:, mask == 0]) and not torch.equal(restored, picture)
    assert torch.equal(restored, i2sb.restore(picture, "inpaint", mask, model=model, calls=2, progress=False, seed=3))


def test_restoring_says_what_is_worth_telling(tmp_path):
    picture, mask, model, told = torch.rand(3, 40, 50) * 2 - 1, torch.zeros(40, 50), i2sb.build(PICTURES), []
    mask[10:20, 5:30] = 1
    Image.fromarray((255 * mask).byte().numpy()).save(tmp_path / "mask.png")
    for each in (tmp_path / "mask.png", mask):
        i2sb.restore(picture, "inpaint", each, model=model, calls=1, progress=False, output=tmp_path / "out.png", say=told.append)
    i2sb.restore(picture, "jpeg", model=model, calls=1, progress=False, say=told.append)
    hole, written = "250 of 2000 pixels are taken for the hole", f"{tmp_path / 'out.png'}: 50 x 40 pixels"
    assert told == [f"{tmp_path / 'mask.png'}: {hole}", written, f"mask: {hole}", written]
    assert i2sb.HOOKS["restore"].function is i2sb.restore and i2sb.HOOKS["restore"].outputs == (".png",)


def test_the_bridge_and_diffusion_from_noise_report_their_steps_alike():
    x1 = digits("test").tensors["x0"][:2]
    for method in ("bridge", "diffusion"):
        seen = []
        i2sb.restore_images(i2sb.build(replace(SMALL, method=method)), x1, calls=4, callback=lambda step, x, x0: seen.append((step, x.shape, x0.shape)))
        assert seen == [(step, x1.shape, x1.shape) for step in range(4)]


def test_what_is_no_picture_is_refused_and_nothing_is_written(tmp_path):
    model = i2sb.build(PICTURES)
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    Image.new("F", (20, 20), 300.0).save(tmp_path / "deep.tif")
    small = Image.new("L", (9, 9))
    small.putpixel((3, 3), 255)
    small.save(tmp_path / "small.png")
    whole, output = tmp_path / "whole.png", tmp_path / "out.png"
    for picture, task, mask, options, words in [
            (tmp_path / "text.png", "jpeg", None, {}, "cannot be read"), (tmp_path / "cut.png", "jpeg", None, {}, "cannot be read"),
            (tmp_path / "deep.tif", "jpeg", None, {}, "between 300 and 300"), (tmp_path, "jpeg", None, {}, "cannot be read"),
            (torch.rand(3, 9, 9) * 255, "jpeg", None, {}, r"\[-1, 1\]"), (whole, "fog", None, {}, "task: expected one of"),
            (whole, "inpaint", None, {}, "mask: the task 'inpaint' needs one"), (whole, "jpeg", whole, {}, "mask: the task 'jpeg' takes none"),
            (whole, "inpaint", tmp_path / "small.png", {}, "mask: expected 64 x 64 pixels"), (whole, "inpaint", tmp_path / "text.png", {}, "mask: .* cannot"),
            (whole, "jpeg", None, {"tile": 50}, "tile: expected a multiple of 16"), (whole, "jpeg", None, {"overlap": 64}, "overlap: expected"),
            (whole, "jpeg", None, {"calls": 1000}, "calls: expected"), (whole, "jpeg", None, {"piece": 0}, "piece: expected")]:
        with pytest.raises(ValueError, match=words):
            i2sb.restore(picture, task, mask, model=model, output=output, progress=False, **{"calls": 1} | options)
    with pytest.raises(ValueError, match="ending in .png"): i2sb.restore(whole, "jpeg", model=model, calls=1, output=tmp_path / "o.jpg", progress=False)
    with pytest.raises(FileNotFoundError): i2sb.restore(tmp_path / "nowhere.png", "jpeg", model=model)
    with pytest.warns(UserWarning, match="this model learned jpeg.inpaint, not blur"):
        i2sb.restore(whole, "blur", model=model, calls=1, progress=False)
    assert not output.exists() and not list(tmp_path.glob("*.tmp"))


def test_the_command_restores_a_file(tmp_path):
    i2sb.save_model(tmp_path / "model.safetensors", i2sb.build(PICTURES))
    Image.new("RGB", (33, 21), "red").save(tmp_path / "red.jpg", quality=10)
    words = ["restore", "i2sb", str(tmp_path / "red.jpg"), "--task", "jpeg", "--model", str(tmp_path / "model.safetensors"),
             "--output", str(tmp_path / "red.png"), "--set", "calls=2", "tile=32"]
    assert main(words) == 0 and Image.open(tmp_path / "red.png").size == (33, 21)
    assert main(words[:4] + ["fog", *words[5:]]) == 1


def test_the_form_restores_what_is_uploaded(monkeypatch):
    monkeypatch.setattr(i2sb, "load_pretrained", lambda *of: i2sb.build(PICTURES))
    (picture, _, task), (calls, button), shown = (box.children if hasattr(box, "children") else box for box in i2sb.desk().children)
    file = io.BytesIO()
    Image.new("RGB", (20, 20), "blue").save(file, "png")
    calls.value = 1
    button.click()
    assert not button.disabled
    picture.value = ({"name": "blue.png", "type": "image/png", "size": 1, "content": memoryview(file.getvalue()),
                      "last_modified": datetime.datetime.now()},)
    button.click()
    assert not button.disabled


def test_two_processes_train_one_bridge(tmp_path):
    words = ["-m", "diffusion_papers", "train", "i2sb", "--device", "cpu", "--folder", "FOLDER", "--set", "training.steps=3",
             "training.batch_size=16", "film.width=8", "evaluated=20"]
    one, two = (trained_by_command(words, tmp_path / str(processes), processes) for processes in (1, 2))
    # float32: where a gradient is almost 0, Adam divides its rounding error by itself; with 15 images instead of 16 it differs by 7e-3
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-4
