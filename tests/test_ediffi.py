"""eDiff-I: the tree, the growth, routing, training, sampling, painting."""
import json
import math
from dataclasses import replace
from pathlib import Path

from extras import need

need("train", "data")

import pytest
import torch

from diffusion_papers import ediffi
from diffusion_papers.core.analytic import gaussian_denoiser
from diffusion_papers.core.samplers import Counted, heun
from diffusion_papers.core.training import Draws, TrainingConfig
from diffusion_papers.ediffi import (
    CONFIGS, Brush, Ensemble, Interval, NoiseLevels, assemble, build, draw_levels, ensemble_intervals, growth, node, noise_grid, paint_weight,
    sample, train)
from diffusion_papers.topics.painted_words import Stroke, painted_regions
from diffusion_papers.topics.prompts import encode_prompts, encoders_of
from diffusion_papers.topics.text_unet import TextUNetConfig, token_places
from diffusion_papers.workbench.checkpoints import CheckpointError

NOISE = NoiseLevels()
SHORT = dict(batch_size=2, precision="no", checkpoint_every=1)
TINY = replace(CONFIGS["cpu"], network=TextUNetConfig(width=32, head_width=16, context_width=16, embedding_width=32, multipliers=(1, 1), blocks=(1, 1), attention=(8,)),
               training=TrainingConfig(steps=2, **SHORT), branch=TrainingConfig(steps=1, **SHORT), expert=TrainingConfig(steps=2, **SHORT),
               world=replace(CONFIGS["cpu"].world, contents=4, most=1, nouns="forty", coloured=0.0, backgrounds="plain", seed=0), low_level=2, high_level=2)


@pytest.fixture(autouse=True)
def encoders(monkeypatch):
    "Without MiniLM's weights: a text encoder that knows any caption, one token a word."
    from diffusion_papers.topics import prompts
    from diffusion_papers.topics.text import BagOfWords, load_tower, TextStates
    class Words:
        name, width, longest, pooling = "words", 384, 16, "mean"
        def encode(self, captions):
            rows = [[len(word) / 9 + ord(word[0]) / 60 for word in text.split()] for text in captions]
            longest = max(1, *map(len, rows))
            there = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
            wave = torch.tensor([row + [0.0] * (longest - len(row)) for row in rows])[..., None] * torch.linspace(1, 8, 384)
            return TextStates(torch.sin(wave), there)
        def spans(self, caption):
            found, start = [], 0
            for word in caption.split(): start = caption.index(word, start); found.append((start, start + len(word))); start += len(word)
            return found
    tower = load_tower()
    made = prompts.Encoders(Words(), BagOfWords(tower), tower.image)
    monkeypatch.setattr(ediffi, "encoders_of", lambda config: made)
    return made


def test_json_of_reference_intervals():
    import importlib.util
    place = Path(__file__).parent / "golden"
    spec = importlib.util.spec_from_file_location("golden_ediffi", place / "ediffi.py")
    module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
    content = json.loads((place / "ediffi" / "intervals.json").read_text())
    blind = content | {"boundaries": {name: [0] * len(values) for name, values in content["boundaries"].items()}, "routing": {"sigmas": content["routing"]["sigmas"]}}
    found = module.compute("intervals", blind)
    for name, value in found.items():
        stored = content
        for part in name.split("/"): stored = stored[part]
        module.compare("intervals", name, value, [math.nan if edge is None else edge for edge in stored] if name.startswith("boundaries") else stored)
    assert len(found) == len(content["boundaries"]) + 4


def test_quantiles_and_levels_are_inverse():
    noise = NoiseLevels(-0.3, 0.7)
    levels = torch.logspace(-2, 1.5, 40, dtype=torch.float64)
    assert torch.allclose(noise.sigma(noise.quantile(levels)), levels, rtol=1e-8) and noise.sigma(0.5).item() == pytest.approx(math.exp(-0.3))
    assert noise.quantile(torch.tensor(math.exp(-0.3 + 0.7))).item() == pytest.approx(0.841345, abs=1e-5)
    with pytest.raises(ValueError, match="p_std"): NoiseLevels(p_std=0.0)


def test_three_experts_together_draw_the_training_distribution():
    uniform = torch.rand(60_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    intervals = ensemble_intervals(3)
    owner = torch.multinomial(torch.tensor([interval.mass for interval in intervals]), 60_000, True, generator=torch.Generator().manual_seed(1))
    levels = torch.cat([draw_levels(uniform[owner == number], interval, NOISE) for number, interval in enumerate(intervals)])
    place = NOISE.quantile(levels).sort()[0]
    distance = (place - (torch.arange(60_000) + 0.5) / 60_000).abs().max() * math.sqrt(60_000)
    assert distance < 1.63  # Kolmogorov and Smirnov at one per cent


def test_draws_never_leave_their_interval():
    for level, index in ((0, 0), (3, 0), (3, 4), (9, 511), (20, 2**20 - 1)):
        low, high = node(level, index).bounds(NOISE)
        drawn = draw_levels(torch.linspace(0, 1, 999), node(level, index), NOISE)
        assert torch.isfinite(drawn).all() and drawn.min() > low and drawn.max() < high and (drawn.diff() > 0).any()


@pytest.mark.parametrize("level, index", [(3, 8), (3, -1), (0, 1)])
def test_nodes_that_are_not_there(level, index):
    with pytest.raises(ValueError, match=f"level {level} has the nodes"): node(level, index)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_level_has_one_owner(count):
    intervals = ensemble_intervals(count)
    ediffi._check_partition(intervals)
    ensemble, levels = Ensemble([None] * count, intervals, NOISE), torch.logspace(-4, 3, 10_000, dtype=torch.float64)
    owners, bounds = ensemble.owner(levels), [interval.bounds(NOISE) for interval in intervals]
    inside = torch.stack([(low <= levels) & (levels < high) for low, high in bounds])
    assert (inside.sum(0) == 1).all() and torch.equal(inside.int().argmax(0), owners)
    edges = torch.tensor([high for _, high in bounds[:-1]], dtype=torch.float64)
    assert ensemble.owner(edges).tolist() == list(range(1, count)) if count > 1 else True  # closed below


def test_gaps_and_overlaps_are_named():
    for wrong, words in (([Interval(0, 0.5), Interval(0.75, 1)], "a gap between the quantiles 0.5 and 0.75"), ([Interval(0, 0.5), Interval(0.25, 1)], "an overlap between the quantiles 0.25 and 0.5"),
                         ([Interval(0.25, 1)], "a gap between the quantiles 0.0 and 0.25"), ([Interval(0, 0.5)], "after the last expert")):
        with pytest.raises(ValueError, match=words): ediffi._check_partition(wrong)
    with pytest.raises(ValueError, match="Interval"): Interval(0.5, 0.5)
    with pytest.raises(ValueError, match="experts"): Ensemble([None], ensemble_intervals(3), NOISE)
    with pytest.raises(ValueError, match="count"): ensemble_intervals(4)


def test_growth_descends_the_outer_branches_once():
    branches = growth(ensemble_intervals(3))
    names = [branch.name for branch in branches]
    assert names[:4] == ["base", "E1_0", "E2_0", "E3_0"] and names[-2:] == ["E9_511", "expert1"] and len(set(names)) == len(names) == 14
    parents = {branch.name: branch.parent for branch in branches}
    assert parents["E2_0"] == "E1_0" and parents["E9_511"] == "E8_255" and parents["expert1"] == "base" and parents["E1_1"] == "base" and parents["base"] == ""
    for branch in branches:
        if branch.parent: assert branch.interval.inside(next(other for other in branches if other.name == branch.parent).interval)
    five = {branch.name: branch for branch in growth(ensemble_intervals(5))}
    assert five["expert1"].parent == "E2_0" and five["expert3"].parent == "E4_15" and five["expert2"].parent == "base"
    assert [branch.name for branch in growth(ensemble_intervals(2))] == ["base", *(f"E{level}_{2**level - 1}" for level in range(1, 10)), "expert0"]


def test_a_batch_of_mixed_levels_is_answered_by_its_owners():
    means = [torch.tensor([value, -value]) for value in (1.0, 2.0, 3.0)]
    three = Ensemble([gaussian_denoiser(mean, 0.5) for mean in means], ensemble_intervals(3), NOISE)
    sigma = torch.tensor([20.0, 0.01, 1.0, 0.02, 50.0])
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([gaussian_denoiser(means[owner], 0.5)(x[[row]], sigma[[row]]) for row, owner in enumerate((2, 0, 1, 0, 2))])
    assert torch.allclose(three(x, sigma), expected)
    with pytest.raises(ValueError, match="sigma"): three(x, torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="look"): three(x, sigma, look=lambda *given: None)


def test_heuns_second_call_belongs_to_the_level_at_which_it_is_asked():
    asked = []
    def expert(number):
        def denoise(x, sigma): asked.append((number, sigma[0].item())); return torch.zeros_like(x)
        return denoise
    three = Ensemble([expert(number) for number in range(3)], ensemble_intervals(3), NOISE)
    heun(three, torch.ones(1, 1), torch.tensor([20.0, 5.0, 0.01, 0.0]))
    assert asked == [(2, 20.0), (1, 5.0), (1, 5.0), (0, pytest.approx(0.01)), (0, pytest.approx(0.01))]


def test_experts_in_use_alone_are_on_the_device():
    model = build(replace(TINY, experts=3)).keep_active("cpu")
    moved = []
    for number, expert in enumerate(model.experts): expert.to = lambda device, number=number: moved.append((number, str(device)))
    model._expert(1)
    assert moved == [(0, "cpu"), (2, "cpu"), (1, "cpu")] and model.device == torch.device("cpu")


def test_copies_of_one_expert_change_not_a_bit():
    one, three = build(TINY), build(replace(TINY, experts=3))
    assert all(torch.equal(a, b) for expert in three.experts for a, b in zip(expert.parameters(), one.experts[0].parameters()))
    for expert in [*one.experts, *three.experts]:
        for parameter in expert.parameters():
            if parameter.ndim > 1 and parameter.abs().max() < 1e-4: torch.nn.init.normal_(parameter.data, std=0.1, generator=torch.Generator().manual_seed(0))
    pictures = [sample(model, 2, prompt="a red car", steps=4, guidance=2.0) for model in (one, three)]
    assert torch.equal(*pictures) and pictures[0].std() > 0.01


def test_children_begin_as_their_parents_and_parents_stay(tmp_path):
    config = replace(TINY, experts=3)
    starts = {}
    import diffusion_papers.ediffi as module
    real = module.fit
    def noted(expert, loss, data, training, folder, title, **options):
        starts[folder.name] = {name: value.clone() for name, value in expert.state_dict().items()}
        done = real(expert, loss, data, training, folder=folder, title=title, **options)
        starts[folder.name + " end"] = {name: value.clone() for name, value in done.state_dict().items()}
        return done
    module.fit = noted
    try: model = train(config, tmp_path, device="cpu")
    finally: module.fit = real
    same = lambda a, b: all(torch.equal(starts[a][name], starts[b][name]) for name in starts[a])
    assert same("E1_0", "base end") and same("E2_0", "E1_0 end") and same("E1_1", "base end") and same("E2_3", "E1_1 end") and same("expert1", "base end")
    assert not same("E2_0", "E2_0 end")
    for expert, name in zip(model.experts, ("E2_0 end", "expert1 end", "E2_3 end")):
        assert all(torch.equal(value, starts[name][key]) for key, value in expert.state_dict().items())
    assert not model.training and len(model.experts) == 3


def test_a_killed_ensemble_resumes_to_the_same_bits(tmp_path):
    config, seen = replace(TINY, experts=2), []
    whole = train(config, tmp_path / "whole", device="cpu")
    class Killed(Exception): pass
    def kill(step, loss):
        seen.append(step)
        if len(seen) == 4: raise Killed
    with pytest.raises(Killed): train(config, tmp_path / "cut", device="cpu", callback=kill)
    again = train(config, tmp_path / "cut", device="cpu", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))
    with pytest.raises(ValueError, match="folder"): train(replace(config, seed=1), tmp_path / "cut", device="cpu", resume=True)


def test_training_starts_from_another_model(tmp_path):
    base = build(replace(TINY, seed=5))
    ediffi.save_model(tmp_path / "base.safetensors", base)
    started = ediffi._start(replace(TINY, start=str(tmp_path / "base.safetensors")))
    assert all(torch.equal(a, b) for a, b in zip(started.state_dict().values(), base.experts[0].state_dict().values()))
    ediffi.save_model(tmp_path / "three.safetensors", build(replace(TINY, experts=3)))
    with pytest.raises(ValueError, match="start: expected a model of one expert"): ediffi._start(replace(TINY, start=str(tmp_path / "three.safetensors")))
    with pytest.raises(CheckpointError): ediffi._start(replace(TINY, network=replace(TINY.network, width=64), start=str(tmp_path / "base.safetensors")))


def test_loss_is_that_of_the_interval(encoders):
    "A network that answers nothing: its loss is the mean square of the target, which is known."
    config, interval = TINY, node(3, 7)
    from diffusion_papers.topics.prompts import CaptionedScenes
    batch = CaptionedScenes(config.world, 32, encoders).__getitems__(range(64))
    expert = ediffi.build_expert(config)
    expert.network = type("Silent", (torch.nn.Module,), {"forward": lambda self, x, label, prompt: torch.zeros_like(x)})()
    seeded = lambda: Draws(torch.Generator().manual_seed(3))
    loss = ediffi.ediffi_loss(expert, batch, seeded(), config, interval, encoders)
    draws = seeded()
    sigma = draw_levels(draws.uniform(batch["x0"]), interval, config.noise)[:, None, None, None].float()
    low, high = interval.bounds(config.noise)
    assert sigma.min() >= low and sigma.max() < high
    noise = draws.normal(batch["x0"])
    star = (sigma**2 + 0.25).sqrt()
    target = (batch["x0"] - (0.5 / star) ** 2 * (batch["x0"] + sigma * noise)) / (sigma * 0.5 / star)
    silent_drawn = target.square().flatten(1).mean(1)
    assert torch.allclose(loss, silent_drawn, rtol=1e-3) or loss.mean().item() == pytest.approx(silent_drawn.mean().item(), rel=0.1)


def test_grids_end_in_nothing():
    grid = noise_grid(20)
    assert len(grid) == 21 and grid[0] == 80 and grid[-2] == pytest.approx(0.002) and grid[-1] == 0 and (grid.diff() < 0).all()
    assert noise_grid(1).tolist() == [80.0, 0.0]
    with pytest.raises(ValueError, match="steps"): noise_grid(0)


@pytest.mark.parametrize("options, words", [
    (dict(count=0), "count"), (dict(guidance=-1.0), "guidance"), (dict(steps=0), "steps"), (dict(solver="rk4"), "solver"), (dict(prompt=["a car"]), "prompt"),
    (dict(seed=-1), "seed")])
def test_wrong_requests_are_refused(options, words):
    with pytest.raises(ValueError, match=words): sample(build(TINY), **(dict(count=2, prompt="a car", steps=1) | options))


def test_calls_do_not_depend_on_the_number_of_experts():
    counts = []
    for count in (1, 2, 3, 5):
        ensemble = Counted(Ensemble([gaussian_denoiser(torch.zeros(1), 0.5)] * count, ensemble_intervals(count), NOISE))
        heun(ensemble, torch.ones(1, 1), noise_grid(25)); counts.append(ensemble.calls)
    assert counts == [49] * 4


# ---- painting

def test_weight_of_a_brush():
    logits, there = torch.zeros(2, 1, 2, 3), torch.ones(2, 3, dtype=torch.bool)
    logits[0, 0, 1, 2], logits[1] = 5.0, -2.0
    sigma = torch.tensor([1.0, 3.0])
    assert paint_weight(logits, there, sigma, 0.5).flatten().tolist() == pytest.approx([0.5 * math.log(2) * 5, 0.0])  # never negative
    hidden = there.clone(); hidden[0, 2] = False
    assert paint_weight(logits, hidden, sigma, 0.5)[0].item() == 0.0  # a maximum over padding does not count
    assert paint_weight(logits, there, sigma, 0.5, pooling="global").flatten().tolist() == pytest.approx([0.5 * math.log(2) * 5, 0.5 * math.log(4) * 5])
    spread = torch.tensor([0, 0, 0, 0, 0, 5.0]).std(correction=0).item()
    assert paint_weight(logits, there, sigma, 1.0, "std").flatten().tolist() == pytest.approx([math.log(2) * spread, 0.0], abs=1e-6)
    visible = logits[0, 0, :, :2].std(correction=0)
    assert paint_weight(logits, hidden, sigma, 1.0, "std")[0].item() == pytest.approx(visible.item())
    for options, words in ((dict(amount=-1), "amount"), (dict(scale="mean"), "scale"), (dict(pooling="some"), "pooling")):
        with pytest.raises(ValueError, match=words): paint_weight(logits, there, sigma, **(dict(amount=1.0) | options))


def test_nothing_painted_changes_nothing(encoders):
    model = build(TINY)
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.abs().max() < 1e-4: torch.nn.init.normal_(parameter.data, std=0.1, generator=torch.Generator().manual_seed(0))
    text = "a red car"
    prompt, half = encode_prompts(encoders, [text]), torch.zeros(32, 32)
    half[:, :16] = 1
    regions = painted_regions(prompt, text, [Stroke("car", half)], encoders, (32, 32))
    of = lambda brush: sample(model, 1, prompt=text, steps=3, guidance=2.0, brush=brush)
    plain = of(None)
    assert torch.allclose(of(Brush(regions, 0.0)), plain, atol=1e-4) and torch.allclose(of(Brush(0 * regions, 1.0)), plain, atol=1e-4)
    assert (of(Brush(regions, 1.0)) - plain).abs().max() > 1e-4


# ---- larger pictures

UPPER = replace(TINY, low_size=16, network=TextUNetConfig(family="efficient", conditioning=3, augmented=True, width=32, head_width=16, context_width=16, embedding_width=32,
                                                          multipliers=(1, 1), blocks=(1, 1), attention=(), cross=(8,)))


def test_a_base_is_shown_nothing_and_an_upsampler_a_noisy_smaller_picture():
    from diffusion_papers.topics.captioned_pictures import enlarged
    x0 = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    same, told = ediffi.training_condition(x0, Draws(torch.Generator()), TINY)
    assert same is x0 and told == {}
    clean = enlarged(torch.nn.functional.avg_pool2d(x0, 2), 32)
    exact = ediffi.training_condition(x0, Draws(torch.Generator().manual_seed(1)), replace(UPPER, augment_most=0.0))[1]
    assert (exact["condition"] - clean).abs().mean() < 0.1 and exact["augmentation"].tolist() == pytest.approx([math.log(1e-3) / 4] * 64)
    noisy = ediffi.training_condition(x0, Draws(torch.Generator().manual_seed(1)), replace(UPPER, augment_most=0.8))[1]
    level = (4 * noisy["augmentation"]).exp()
    assert 0.3 < level.mean() < 0.5 and level.max() <= 0.8
    found = (noisy["condition"] - exact["condition"]).flatten(1).std(1)
    assert torch.corrcoef(torch.stack([found, level]))[0, 1] > 0.99 and (found / level)[level > 0.1].std() < 0.05  # the noise is of the level that is told
    plain = ediffi.training_condition(x0, Draws(torch.Generator().manual_seed(1)), replace(UPPER, augment="degradation", network=replace(UPPER.network, augmented=False)))[1]
    assert plain.keys() == {"condition"} and (plain["condition"] - clean).abs().mean() > 0.02


def test_crops_of_both_sizes_show_the_same_place():
    config = replace(UPPER, picture_size=64, low_size=32, augment="none", network=replace(UPPER.network, augmented=False))
    ramp = torch.linspace(-1, 1, 64).expand(8, 3, 64, 64) * 0.5 + torch.linspace(-1, 1, 64)[:, None].expand(8, 3, 64, 64) * 0.4
    crops, told = ediffi.training_condition(ramp, Draws(torch.Generator().manual_seed(0)), config)
    assert crops.shape == told["condition"].shape == (8, 3, 32, 32) and len({crop[0, 0, 0].item() for crop in crops}) > 3
    assert (crops - told["condition"])[..., 2:-2, 2:-2].abs().max() < 0.02 and config.factor == 2


def test_pictures_are_enlarged_by_the_factor_and_a_level_of_nothing_is_the_picture(encoders):
    model, low = build(UPPER), torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen = []
    real = model.experts[0].network.forward
    model.experts[0].network.forward = lambda x, label, prompt=None, condition=None, augmentation=None: seen.append((condition, augmentation)) or real(x, label, prompt, condition, augmentation)
    large = ediffi.upsample(model, low, prompt="a car", level=0.0, steps=1)
    from diffusion_papers.topics.captioned_pictures import enlarged
    assert large.shape == (2, 3, 32, 48) and torch.allclose(seen[0][0], enlarged(low, (32, 48)), atol=1e-6) and seen[0][1].tolist() == pytest.approx([math.log(1e-3) / 4] * 2)
    ediffi.upsample(model, low, prompt="a car", level=0.5, steps=1, guidance=2.0)
    assert len(seen[-1][0]) == 4 and seen[-1][1].tolist() == pytest.approx([math.log(0.5) / 4] * 4) and (seen[-1][0][:2] - enlarged(low, (32, 48))).std() > 0.1


def test_a_cascade_is_checked_before_it_begins(encoders):
    base = build(replace(TINY, network=replace(TINY.network, image_size=16)))
    stages = ediffi.cascade([base, build(UPPER)], 2, prompt="a car", steps=1)
    assert [tuple(stage.shape) for stage in stages] == [(2, 3, 16, 16), (2, 3, 32, 32)]
    with pytest.raises(ValueError, match="stage 1"): ediffi.cascade([build(TINY), build(UPPER)], 1, prompt="a car")
    with pytest.raises(ValueError, match="model"): ediffi.upsample(base, stages[0])


@pytest.mark.parametrize("changes, words", [(dict(low_size=16), "low_size"), (dict(augment="blur"), "augment"), (dict(experts=4), "experts"), (dict(data_std=0.0), "data_std")])
def test_wrong_configurations_are_refused(changes, words):
    with pytest.raises(ValueError, match=words): replace(TINY, **changes)
    with pytest.raises(ValueError, match="low_size"): replace(UPPER, low_size=20)


def test_an_upsampler_trains_and_resumes(tmp_path):
    model = train(replace(UPPER, training=TrainingConfig(steps=1, **SHORT)), tmp_path, device="cpu")
    ediffi.save_model(tmp_path / "model.safetensors", model)
    again = ediffi.load_model(tmp_path / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values())) and again.config == model.config


def test_an_upsampler_is_measured_by_what_it_enlarges(encoders, monkeypatch):
    model = build(replace(UPPER, evaluated=3))
    for parameter in model.parameters(): torch.nn.init.zeros_(parameter.data)
    levels, enlarge = [], ediffi.upsample
    monkeypatch.setattr(ediffi, "upsample", lambda *given, **options: levels.append(options["level"]) or enlarge(*given, **options))
    [row] = ediffi.evaluate(model, steps=2)
    assert levels == [0.0]  # they are reductions of true pictures
    assert row["pictures"] == 3 and 0 < row["error, bilinear"] < row["error"] and row["noun, true scenes"] >= 0
    with pytest.raises(ValueError, match="expected a base"): sample(model, 1)


def test_many_pictures_are_enlarged_from_a_folder(tmp_path, encoders):
    base, upper = build(replace(TINY, network=replace(TINY.network, image_size=16))), build(UPPER)
    (tmp_path / "captions.txt").write_text("a car\na bus\na red car\n")
    options = dict(prompts=str(tmp_path / "captions.txt"), steps=1, size=2, device="cpu")
    ediffi.generate_data(base, tmp_path / "small", **options)
    large = ediffi.generate_data(upper, tmp_path / "large", low=str(tmp_path / "small"), guidance=1.0, **options)
    assert len(large) == 3 and large[2]["images"].shape == (3, 32, 32)
    for model, low, words in ((base, str(tmp_path / "small"), "none, for a base"), (upper, "", "folder of smaller")):
        with pytest.raises(ValueError, match=f"low: expected .*{words}"): ediffi.generate_data(model, tmp_path / "wrong", low=low, **options)
    (tmp_path / "more.txt").write_text("a car\n" * 4)
    with pytest.raises(ValueError, match="low: expected a picture for each of 4 captions"):
        ediffi.generate_data(upper, tmp_path / "wrong", low=str(tmp_path / "small"), **options | {"prompts": str(tmp_path / "more.txt")})
    assert not (tmp_path / "wrong").exists()


# ---- pictures of yours, and the paper's sizes

def write_shard(path, count=4):
    import io
    import tarfile
    from PIL import Image
    with tarfile.open(path, "w") as archive:
        for number in range(count):
            buffer = io.BytesIO()
            Image.new("RGB", (40, 36), (60 * number, 20, 90)).save(buffer, "PNG")
            for ending, content in (("png", buffer.getvalue()), ("txt", b"a red car")):
                entry = tarfile.TarInfo(f"{number:03d}.{ending}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def test_a_base_trains_on_shards_of_yours(tmp_path, encoders, monkeypatch):
    from diffusion_papers.topics.prompts import Encoders
    monkeypatch.setattr(ediffi, "encoders_of", lambda config: Encoders(None, encoders.clip, encoders.image))
    (tmp_path / "shards").mkdir()
    write_shard(tmp_path / "shards" / "00000.tar")
    config = replace(TINY, data="tars", data_path=str(tmp_path / "shards"))
    batch = ediffi.load_data(config).__getitems__([0, 3])
    assert batch["x0"].shape == (2, 3, 32, 32) and batch["clip_there"].any() and "text" not in batch and (tmp_path / "shards" / "states").is_dir()
    model = train(config, tmp_path / "run", device="cpu")
    assert ediffi.evaluate(model) == []
    elsewhere = replace(config, states_path=str(tmp_path / "elsewhere"))
    ediffi.load_data(elsewhere)
    assert (tmp_path / "elsewhere").is_dir()
    with pytest.raises(ValueError, match="data_path"): train(replace(config, data_path=""), device="cpu")
    with pytest.raises(ValueError, match="data:"): replace(config, data="pictures")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_brief_run_needs_nothing_from_elsewhere(name):
    config, short = CONFIGS[name], CONFIGS[name].brief()
    assert (short.data, short.data_path, short.start, short.encoders.text, short.experts, short.world.contents) == ("emoji", "", "", "none", 1, 2)
    assert short.encoders.clip == ("bag" if config.encoders.clip == "bag" else "none") and short.network == config.network and short.low_size == config.low_size


def test_experts_can_be_counted_without_memory():
    with torch.device("meta"): model = build(replace(TINY, experts=3))
    assert len(model.experts) == 3 and model.intervals == ensemble_intervals(3, 2, 2)


def test_branches_grow_from_a_base_that_is_there():
    [base] = build(replace(TINY, seed=5)).experts
    same = train(TINY, base=base, device="cpu").experts[0]
    assert all(torch.equal(a, b) for a, b in zip(base.state_dict().values(), same.state_dict().values()))
    frozen = {part: replace(getattr(TINY, part), lr=1e-12) for part in ("branch", "expert")}
    for expert in train(replace(TINY, experts=3, **frozen), base=base, device="cpu").experts:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(base.state_dict().values(), expert.state_dict().values()))


# ---- files

def test_a_painting_is_a_file(tmp_path, encoders):
    from diffusion_papers.core.pictures import read_picture, write_picture
    model, half = build(TINY), -torch.ones(3, 64, 64)
    half[0], half[:, :, 32:] = 1, 1
    write_picture(tmp_path / "regions.png", half)
    told, options = [], dict(prompt="a red car and a red car", colours="red: car:2", steps=2, model=model)
    pictures = ediffi.paint_file(tmp_path / "regions.png", count=3, output=tmp_path / "out.png", say=told.append, **options)
    assert pictures.shape == (3, 3, 32, 32) and read_picture(tmp_path / "out.png").colour.shape == (3, 32, 96) and told == ["'car' on 50% of the picture"]
    seen = []
    real = ediffi.Brush
    class Noted(real):
        def __init__(self, regions, *rest): seen.append(regions); super().__init__(regions, *rest)
    ediffi.Brush = Noted
    try: ediffi.paint_file(tmp_path / "regions.png", count=1, **options)
    finally: ediffi.Brush = real
    words = seen[0][0, 1:8].amax((1, 2)).tolist()
    assert words == [0, 0, 0, 0, 0, 0, 1] and seen[0][0, 7, :, :16].min() == 1 and seen[0][0, 7, :, 16:].max() == 0
    for wrong, words in (({"colours": ""}, "colours"), ({"colours": "red"}, "colours"), ({"colours": "red: bus"}, "bus"), ({"count": 0}, "count"), ({"amount": -1.0}, "amount"),
                         ({"output": tmp_path / "out.jpg"}, "output"), ({"tolerance": 900}, "tolerance")):
        with pytest.raises(ValueError, match=words): ediffi.paint_file(tmp_path / "regions.png", **options | wrong)


@pytest.mark.parametrize("text, found", [("red: a car; #00ff00 : tree:2 ", {"red": "a car", "#00ff00": "tree:2"}), ("blue:x;", {"blue": "x"})])
def test_colours_are_read_from_a_text(text, found): assert ediffi._colours(text) == found


def test_a_picture_file_is_enlarged(tmp_path, encoders):
    from diffusion_papers.core.pictures import read_picture, write_picture
    write_picture(tmp_path / "small.png", torch.zeros(3, 16, 24))
    told = []
    large = ediffi.enlarge_file(tmp_path / "small.png", prompt="a car", steps=2, model=build(UPPER), output=tmp_path / "large.png", say=told.append)
    assert large.shape == (1, 3, 32, 48) and read_picture(tmp_path / "large.png").colour.shape == (3, 32, 48) and told == ["24 x 16 pixels became 48 x 32"]
    write_picture(tmp_path / "odd.png", torch.zeros(3, 15, 24))
    with pytest.raises(ValueError, match="multiples of 2, got 24 x 15"): ediffi.enlarge_file(tmp_path / "odd.png", model=build(UPPER))
    with pytest.raises(ValueError, match="super-resolution"): ediffi.enlarge_file(tmp_path / "small.png", model=build(TINY))


def test_experts_that_were_kept_apart_are_assembled():
    models = [build(replace(TINY, seed=seed)) for seed in range(3)]
    whole = assemble(models)
    assert whole.intervals == ensemble_intervals(3, 2, 2) and whole.config.experts == 3
    x, sigma = torch.randn(3, 3, 32, 32), torch.tensor([0.01, 1.0, 70.0])
    for model, expert in zip(models, whole.experts):
        assert all(torch.equal(a, b) for a, b in zip(model.experts[0].state_dict().values(), expert.state_dict().values()))
    assert whole.owner(sigma).tolist() == [0, 1, 2]
    for others, words in (([models[0], build(replace(TINY, noise=NoiseLevels())), models[2]], "another noise"), ([whole, *models[1:]], "one expert each"), (models + models[:1], "experts")):
        with pytest.raises(ValueError, match=words): assemble(others)


def test_sampling_begins_with_noise_of_the_largest_level(monkeypatch, encoders):
    starts = []
    monkeypatch.setattr(ediffi, "SAMPLERS", {"heun": lambda denoise, x, sigmas, callback: starts.append((x, sigmas)) or x})
    sample(build(TINY), 32, prompt="a car", seed=3)
    ediffi.upsample(build(UPPER), torch.zeros(32, 3, 16, 16), seed=3)
    for x, sigmas in starts: assert x.std().item() == pytest.approx(80, rel=0.02) and sigmas[0] == 80 and x.shape == (32, 3, 32, 32)
    assert torch.equal(starts[0][0], 80.0 * torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(3)))


RESIDUAL = replace(UPPER, residual=True, data_std=0.1)


def test_what_an_enlarged_picture_lacks_is_learned(encoders):
    x0, seen = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1, []
    batch = {"x0": x0} | {name: torch.zeros(8, 1, width) for name, width in (("text", 384), ("clip", 64))} | {f"{name}_there": torch.ones(8, 1, dtype=torch.bool) for name in ("text", "clip")}
    config = replace(RESIDUAL, noise=NoiseLevels(-9.0, 0.01))
    expert = ediffi.build_expert(config)
    expert.network.forward = lambda x, label, **cond: seen.append((x, cond["condition"])) or torch.zeros_like(x)
    ediffi.ediffi_loss(expert, batch, Draws(torch.Generator().manual_seed(1)), config, node(0, 0), encoders)
    [(x, condition)] = seen
    assert torch.allclose(0.1 * x, x0 - condition, atol=2e-3) and condition.std() > 0.1  # nearly without noise, the input is the difference in units of its deviation


@pytest.mark.parametrize("solver", ediffi.SOLVERS)
def test_a_residual_model_that_says_nothing_leaves_the_enlarged_picture(encoders, solver):
    from diffusion_papers.topics.captioned_pictures import enlarged
    model, low, seen = build(RESIDUAL), torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1, []
    model.experts[0].network.forward = lambda x, label, prompt=None, condition=None, augmentation=None: seen.append(condition) or torch.zeros_like(x)
    made = ediffi.upsample(model, low, prompt="a car", level=0.0, solver=solver, guidance=2.0, callback=lambda step, x, x0: seen.append((x, x0)))
    assert (made - enlarged(low, (32, 48))).std().item() == pytest.approx(0.1, rel=0.4)  # what is left is as large as the data, but for the solver's error
    x, x0 = next(entry for entry in seen if isinstance(entry, tuple))
    assert (x0 - enlarged(low, (32, 48))).abs().max() < 0.02 and (x - enlarged(low, (32, 48))).std().item() == pytest.approx(160 * 0.1, rel=0.05)
    assert torch.allclose(seen[0][:2], enlarged(low, (32, 48)), atol=1e-6)


def test_a_base_has_nothing_to_add_to():
    with pytest.raises(ValueError, match="residual: expected False for a base"): replace(TINY, residual=True)
    with pytest.raises(ValueError, match="another residual"): assemble([build(RESIDUAL), build(replace(UPPER, data_std=0.1)), build(RESIDUAL)])


def test_a_style_is_told(monkeypatch, encoders):
    told, real = [], ediffi.guided_by_prompt
    monkeypatch.setattr(ediffi, "guided_by_prompt", lambda model, prompt, *rest, **cond: told.append(prompt) or real(model, prompt, *rest, **cond))
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sample(build(TINY), 2, prompt="a car", style=picture, steps=1)
    with torch.no_grad(): assert torch.allclose(told[0].image, encoders.image(picture).expand(2, -1), atol=1e-6)


def test_models_are_judged_on_scenes_of_another_world():
    from diffusion_papers.topics.emoji_world import emoji_scenes, held_out_pairs
    config = replace(TINY, world=replace(CONFIGS["cpu"].world, contents=4))
    asked = ediffi._asked_scenes(config, 300)
    assert not torch.equal(asked.noun, emoji_scenes(range(300), replace(config.world, contents=0)).noun) and len(asked.noun[:, 0].unique()) > 20
    for pairs, expected in (("seen", False), ("held_out", True)):
        scenes = ediffi._asked_scenes(config, 300, pairs)
        named = scenes.colour >= 0
        assert named.any() and (held_out_pairs()[scenes.noun, scenes.colour.clamp(min=0)][named] == expected).all()


def test_what_is_painted_is_judged_batch_by_batch(monkeypatch, encoders):
    from diffusion_papers.topics.emoji_world import alignment, caption, draw_emoji, load_judge, read_pictures
    config, calls = replace(TINY, world=replace(CONFIGS["cpu"].world, most=1, contents=4)), []
    scenes = ediffi._asked_scenes(config, 30)
    captions = [caption(scenes, number) for number in range(30)]
    wrong = draw_emoji(replace(scenes, colour=torch.where(scenes.colour >= 0, (scenes.colour + 3) % 7, -1)), 32)[0]
    def painted(model, count, *, prompt, seed, **options):
        calls.append((count, prompt, seed, options))
        return wrong[[captions.index(text) for text in prompt]]
    monkeypatch.setattr(ediffi, "sample", painted)
    [row] = ediffi.evaluate(build(config), 30, batch=13, guidance=2.0, steps=7)
    assert [count for count, *_ in calls] == [13, 13, 4] and [text for _, prompt, *_ in calls for text in prompt] == captions and len({seed for *_, seed, _ in calls}) == 3
    assert all(options == {"guidance": 2.0, "steps": 7} for *_, options in calls) and (row["pictures"], row["guidance"], row["calls"]) == (30, 2.0, 13)
    shown = wrong[[captions.index(text) for text in captions]]
    for name, answers in alignment(read_pictures(load_judge(), shown), scenes).items():
        if not answers.isnan().all(): assert row[name] == pytest.approx(answers.nanmean().item())
    assert row["colour"] < 0.3 < 0.8 < row["colour, true scenes"]


def test_every_piece_has_captions_and_noise_of_its_own(tmp_path, monkeypatch, encoders):
    (tmp_path / "captions.txt").write_text("a\nb\nc\nd\ne\n")
    calls = []
    monkeypatch.setattr(ediffi, "sample", lambda model, count, *, prompt, seed, **options: calls.append((prompt, seed)) or torch.zeros(count, 3, 32, 32))
    ediffi.generate_data(build(TINY), tmp_path / "made", prompts=str(tmp_path / "captions.txt"), size=2, device="cpu")
    assert [prompt for prompt, _ in calls] == [["a", "b"], ["c", "d"], ["e"]] and len({seed for _, seed in calls}) == 3


def test_stages_of_a_cascade_have_noise_and_levels_of_their_own(monkeypatch):
    from types import SimpleNamespace
    stage = lambda low, whole: SimpleNamespace(config=SimpleNamespace(low_size=low, whole=whole))
    calls = []
    monkeypatch.setattr(ediffi, "sample", lambda model, count, *, prompt, seed: calls.append((None, seed)) or torch.full((count, 3, 8, 8), 3.0))
    monkeypatch.setattr(ediffi, "upsample", lambda model, low, *, prompt, level, seed: calls.append((level, seed)) or low)
    ediffi.cascade([stage(0, 8), stage(8, 16), stage(16, 32), stage(32, 64)], 1, prompt="a car", seed=5, levels=(0.1, 0.3))
    assert [level for level, _ in calls] == [None, 0.1, 0.3, 0.3] and len({seed for _, seed in calls}) == 4 and calls[0][1] == 5


def test_branches_are_trained_as_what_they_are_each_with_numbers_of_its_own():
    config = replace(TINY, experts=3, seed=6, branch=replace(TINY.branch, lr=3e-4), expert=replace(TINY.expert, lr=2e-4))
    found = {branch.name: ediffi._branch_training(config, branch) for branch in growth(config.intervals)}
    kinds = {"base": config.training, "E1_0": config.branch, "E2_0": config.expert, "E1_1": config.branch, "E2_3": config.expert, "expert1": config.expert}
    assert {name: replace(training, seed=0) for name, training in found.items()} == kinds
    assert found["base"].seed == 6 and len({training.seed for training in found.values()}) == 6


def test_networks_are_told_a_quarter_of_the_logarithm_and_scaled_for_their_data():
    expert, sigma = ediffi.build_expert(replace(TINY, data_std=0.7)), torch.tensor([0.1, 3.0], dtype=torch.float64)
    skip, out, scale, label = expert.coefficients(torch.zeros(2, 1, dtype=torch.float64), sigma)
    star = (sigma**2 + 0.49).sqrt()
    for found, expected in ((skip[:, 0], 0.49 / star**2), (out[:, 0], 0.7 * sigma / star), (scale[:, 0], 1 / star), (label, sigma.log() / 4)): assert torch.allclose(found, expected)


def test_the_loss_is_exact(encoders):
    "What a silent network answers for is the target itself; noise comes after the numbers that silence encoders."
    from diffusion_papers.topics.prompts import CaptionedScenes
    batch, interval = CaptionedScenes(TINY.world, 32, encoders).__getitems__(range(8)), node(3, 7)
    expert = ediffi.build_expert(TINY)
    expert.network = type("Silent", (torch.nn.Module,), {"forward": lambda self, x, label, prompt: torch.zeros_like(x)})()
    draws, x0 = Draws(torch.Generator().manual_seed(3)), batch["x0"]
    sigma = draw_levels(draws.uniform(x0), interval, TINY.noise)[:, None, None, None].float()
    for _ in range(3): draws.uniform(x0)
    noise, star = draws.normal(x0), (sigma**2 + 0.25).sqrt()
    target = (x0 - (0.5 / star) ** 2 * (x0 + sigma * noise)) / (sigma * 0.5 / star)
    found = ediffi.ediffi_loss(expert, batch, Draws(torch.Generator().manual_seed(3)), TINY, interval, encoders)
    assert torch.allclose(found, target.square().flatten(1).mean(1), rtol=1e-4)


def test_commands_hand_on_what_they_are_told(tmp_path, monkeypatch, encoders):
    from diffusion_papers.core.pictures import write_picture
    half, brushes, levels, real = torch.ones(3, 32, 32), [], [], ediffi.Brush
    half[1:, :, :16] = -1
    write_picture(tmp_path / "regions.png", half); write_picture(tmp_path / "small.png", torch.zeros(3, 16, 16))
    class Noted(real):
        def __init__(self, regions, amount, scale): brushes.append((amount, scale)); super().__init__(regions, amount, scale)
    monkeypatch.setattr(ediffi, "Brush", Noted)
    ediffi.paint_file(tmp_path / "regions.png", prompt="a car", colours="red: car", amount=0.3, scale="std", count=1, steps=1, model=build(TINY))
    up = ediffi.upsample
    monkeypatch.setattr(ediffi, "upsample", lambda model, small, **options: levels.append(options) or up(model, small, **options))
    ediffi.enlarge_file(tmp_path / "small.png", prompt="a car", level=0.37, guidance=1.5, steps=1, seed=4, model=build(UPPER))
    assert brushes == [(0.3, "std")] and levels == [{"prompt": "a car", "level": 0.37, "guidance": 1.5, "steps": 1, "seed": 4}]


def test_networks_of_the_papers_size_look_where_they_should():
    from diffusion_papers.topics.text_unet import TextAttention
    with torch.device("meta"): networks = {name: ediffi.build_expert(CONFIGS[name]).network for name in ("base64", "sr256", "sr1024")}
    sizes = {name: sum(parameter.numel() for parameter in network.parameters()) for name, network in networks.items()}
    assert sizes["base64"] == pytest.approx(917.4e6, rel=0.05) and sizes["sr256"] == pytest.approx(0.3e9, rel=0.1)
    looks = lambda name: [[(look.own is not None) for look in level.attentions] for level in networks[name].down]
    assert looks("base64") == [[], *[[True] * 3] * 3] and looks("sr256") == [[], [], [], [True]] and looks("sr1024") == [[], [], [], [], [False]]
    assert sum(isinstance(module, TextAttention) for module in networks["base64"].modules()) == 22
    for name, batch_size, experts, size in (("base64", 2048, 3, 64), ("sr256", 512, 2, 256), ("sr1024", 512, 1, 1024)):
        config = CONFIGS[name]
        assert (config.noise, config.training.batch_size, config.experts, config.whole) == (NoiseLevels(-1.2, 1.2), batch_size, experts, size)
        assert (config.training.lr, config.training.weight_decay, config.training.ema, config.training.steps) == (1e-4, 0.01, 0.9999, 500_000)
        assert (config.network.text_width, config.network.clip_width, config.network.image_width, config.network.context_width) == (4096, 768, 768, 1024)



def test_noise_of_a_smaller_picture_is_not_the_noise_that_it_was_painted_from(tmp_path, monkeypatch, encoders):
    (tmp_path / "captions.txt").write_text("a\nb\n")
    starts, noises, real = [], [], ediffi.noisy_condition
    monkeypatch.setattr(ediffi, "SAMPLERS", {"heun": lambda denoise, x, sigmas, callback: starts.append(x) or x})
    monkeypatch.setattr(ediffi, "noisy_condition", lambda low, level, noise: noises.append(noise) or real(low, level, noise))
    base, upper, options = build(replace(TINY, network=replace(TINY.network, image_size=16))), build(UPPER), dict(prompts=str(tmp_path / "captions.txt"), device="cpu")
    ediffi.generate_data(base, tmp_path / "small", **options)
    ediffi.generate_data(upper, tmp_path / "large", low=str(tmp_path / "small"), **options)
    assert abs(torch.corrcoef(torch.stack([starts[0].flatten(), noises[0].flatten()]))[0, 1].item()) < 0.1


def test_bounds_of_experts_stay_exact_in_half_precision():
    model, sigma = build(replace(TINY, experts=3, noise=NoiseLevels(), low_level=3, high_level=9)), torch.tensor([9.6095, 9.6096], dtype=torch.float64)
    assert model.owner(sigma).tolist() == model.half().owner(sigma).tolist() == [1, 2]
