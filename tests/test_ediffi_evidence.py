"""How eDiff-I is compared: sides of equal samples, losses by interval, binding, painted halves, retrieval, published measures."""
from dataclasses import replace

import pytest
import torch
from extras import need

need("train", "data")
from diffusion_papers.core.denoisers import denoising_loss
from diffusion_papers.ediffi import CONFIGS, build, draw_levels, growth, load_model
from diffusion_papers.evidence import ediffi as room
from diffusion_papers.evidence.ediffi import (
    ARENA, INTERVALS, PROBES, STUDIES, WIDER, Rebalanced, all_right, bound, captions_of, further, halves, held_out, inside, losses, measure_clip, measure_fid, pairs_of,
    regions_for, retrieved, sides, steps_of, switching_rows, told, understood)
from diffusion_papers.topics.emoji_world import caption, draw_emoji, emoji_scenes
from diffusion_papers.topics.painted_words import half_of
from diffusion_papers.topics.prompts import Encoders, encode_prompts, encoders_of
from diffusion_papers.topics.text import shipped_captions
from words import Words

SMALL = dict(batch_size=2, lr=1e-3)
TINY = ARENA.override(**{"encoders.text": "none", "world.contents": 6, "network.embedding_width": 32, "network.context_width": 16, "training.steps": 2, "branch.steps": 1, "expert.steps": 2}
                      | {f"{part}.{name}": value for part in ("training", "branch", "expert") for name, value in SMALL.items()})


def moved(scenes, *places): return replace(scenes, place=torch.tensor(places)[None].expand(len(scenes), -1, -1).clone())


# ---- sides

def test_rebalanced_levels_come_from_each_interval_equally_often():
    config = CONFIGS["cpu"].override(experts=3)
    edges = Rebalanced(config.intervals).at(torch.tensor([0.0, 0.5 / 3, 1 / 3 + 1e-12, 0.5, 2 / 3 + 1e-12, 1.0], dtype=torch.float64))
    low, middle, high = config.intervals
    assert edges.tolist() == pytest.approx([0.0, low.mass / 2, low.last, middle.first + middle.mass / 2, middle.last, 1.0])
    sigma = draw_levels(torch.rand(9000, generator=torch.Generator().manual_seed(0)), Rebalanced(config.intervals), config.noise)
    shares = torch.histc(torch.bucketize(sigma, torch.tensor([interval.bounds(config.noise)[0] for interval in config.intervals[1:]]).double()).float(), 3, 0, 2) / 9000
    assert (shares - 1 / 3).abs().max() < 0.02


def test_rivals_have_as_many_steps_as_all_branches(monkeypatch):
    branches = [branch for branch in growth(TINY.intervals) if branch.parent]
    assert steps_of(TINY) == 3 * 2 + (len(branches) - 3) * 1
    seen = {}
    real = room.fit
    monkeypatch.setattr(room, "fit", lambda model, loss, data, training, **options: seen.update({loss.keywords["interval"].__class__.__name__: training}) or real(model, loss, data, training, **options))
    data = room.load_data(TINY)
    base = build(replace(TINY, experts=1, seed=4)).experts[0]
    kept = {name: value.clone() for name, value in base.state_dict().items()}
    models = sides(TINY, base, data)
    assert models.keys() == {"base", "experts", "continued", "rebalanced"} and {training.steps for training in seen.values()} == {steps_of(TINY)} and seen.keys() == {"Interval", "Rebalanced"}
    assert all(torch.equal(value, base.state_dict()[name]) and torch.equal(value, models["base"].experts[0].state_dict()[name]) for name, value in kept.items())
    assert len(models["experts"].experts) == 3 and len(models["continued"].experts) == 1
    assert all(any(not torch.equal(a, b) for a, b in zip(models[name].experts[0].state_dict().values(), kept.values())) for name in ("continued", "rebalanced"))
    same = further(replace(TINY, expert=replace(TINY.expert, lr=1e-12)), base, data, Rebalanced(TINY.intervals))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(same.state_dict().values(), kept.values()))


def test_the_wider_rival_has_three_times_the_parameters():
    sizes = []
    for config in (ARENA, ARENA.override(**WIDER)):
        with torch.device("meta"): sizes.append(sum(p.numel() for p in room.build_expert(config).parameters()))
    assert 3 <= sizes[1] / sizes[0] < 3.15


def test_losses_are_those_of_the_owner_in_each_interval():
    model = build(TINY)
    for number, expert in enumerate(model.experts):
        for parameter in expert.parameters():
            if parameter.ndim > 1: torch.nn.init.normal_(parameter.data, std=0.05 * (number + 1), generator=torch.Generator().manual_seed(number))
    scenes, generator = held_out(TINY, 6), torch.Generator().manual_seed(0)
    found = losses(model, TINY, scenes)
    x0, prompt = draw_emoji(scenes, 32)[0], encode_prompts(encoders_of(TINY.encoders), captions_of(scenes))
    for number, name in enumerate(INTERVALS):
        share = (torch.randperm(6, generator=generator).double() + 0.5) / 6
        sigma, noise = draw_levels(share, TINY.intervals[number], TINY.noise).float(), torch.randn(x0.shape, generator=generator)
        low, high = TINY.intervals[number].bounds(TINY.noise)
        assert (sigma >= low * 0.999).all() and (sigma < high).all()
        with torch.no_grad(): expected = denoising_loss(model.experts[number], x0, sigma, noise, prompt=prompt).mean().item()
        assert found[name] == pytest.approx(expected, rel=1e-4)
    assert losses(model, TINY, scenes) == found and len(set(found.values())) == 3


# ---- what the judge is asked

def test_scenes_are_those_that_nobody_trained_on():
    scenes = held_out(CONFIGS["cpu"], 50)
    assert not torch.equal(scenes.noun, emoji_scenes(range(50), CONFIGS["cpu"].world).noun) and not torch.equal(scenes.noun, held_out(CONFIGS["cpu"], 50, 1).noun)
    known = understood(CONFIGS["cpu"], 30, 2)
    assert len(known) == 30 and set(captions_of(known)) <= set(shipped_captions()) and (known.count == 1).all() and len(set(captions_of(known))) > 15


def test_whole_is_every_answer_that_was_asked_for():
    nan = float("nan")
    answers = {"noun": torch.tensor([1.0, 1.0, 0.5, 1.0]), "colour": torch.tensor([1.0, nan, 1.0, 0.0])}
    assert all_right(answers).tolist() == [True, True, False, False]
    scenes = understood(CONFIGS["cpu"], 24)
    true = draw_emoji(scenes, 32)[0]
    assert told(true, scenes)["whole"] > 0.8 and told(true.flip(0), scenes)["whole"] < 0.4
    assert told(3 * true, scenes)["noun"] > 0.5  # what is beyond white is white


def test_binding_is_seen():
    pairs = pairs_of(CONFIGS["cpu"], 40)
    assert len(pairs) == 40 and (pairs.colour[:, 0] != pairs.colour[:, 1]).all() and (pairs.colour[:, :2] >= 0).all() and not any(word in caption(pairs, 3) for word in (" left ", " on ", "above"))
    true, exchanged = (draw_emoji(scenes, 32)[0] for scenes in (pairs, replace(pairs, colour=pairs.colour[:, [1, 0, 2]])))
    assert bound(true, pairs)[0] > 0.9 and bound(exchanged, pairs)[0] < 0.1 and bound(true, pairs)[1] > 0.7
    assert bound(torch.zeros(40, 3, 32, 32), pairs) == (0.0, 0.0)
    mixed, judged = bound(torch.cat([true[:20], exchanged[20:]]), pairs)
    assert 0.3 < mixed < 0.7 and judged > 0.7


def test_regions_take_turns_and_the_second_thing_has_the_rest():
    turns = halves(5, 8)
    for region, name in zip(turns, ("left", "right", "upper", "lower", "left")): assert torch.equal(region, half_of(name, 8))
    pairs = pairs_of(CONFIGS["cpu"], 40)
    left = halves(1, 32).expand(40, -1, -1)
    apart, crossed = (draw_emoji(moved(pairs, *places), 32)[0] for places in (((0.27, 0.5), (0.73, 0.5), (0.5, 0.5)), ((0.73, 0.5), (0.27, 0.5), (0.5, 0.5))))
    assert inside(apart, pairs, left) > 0.85 and inside(crossed, pairs, left) < 0.15 and inside(torch.zeros(40, 3, 32, 32), pairs, left) == 0


def test_every_thing_is_painted_into_its_region():
    pairs, known = pairs_of(CONFIGS["cpu"], 3), encoders_of(CONFIGS["cpu"].encoders)
    encoders = Encoders(Words(), known.clip, known.image)
    prompt = encode_prompts(encoders, captions_of(pairs))
    regions = regions_for(prompt, pairs, halves(3, 32), encoders, (32, 32))
    words = caption(pairs, 1).split()
    between = words.index("and")
    assert regions.shape[0] == 3
    for number in range(len(words)):
        painted = regions[1, 1 + number]  # after the null token
        if number == between: assert not painted.any()
        else: assert torch.equal(painted, half_of("right" if number < between else "left", 32))


# ---- rivals

def test_retrieval_shows_the_training_scene_with_the_caption(monkeypatch):
    config = TINY.override(**{"world.contents": 40})
    monkeypatch.setattr(room, "encoders_of", lambda _: Encoders(Words(), None, None))
    scenes = emoji_scenes(range(40), config.world)
    captions = captions_of(scenes)
    number = next(n for n in range(40) if captions.index(captions[n]) == n and n > 3)
    assert torch.equal(retrieved(config, [captions[number]], 32)[0], draw_emoji(scenes.select([number]), 32)[0][0])
    found = retrieved(config, ["an unheard caption", captions[number]], 32)
    assert torch.equal(found[1], retrieved(config, [captions[number]], 32)[0]) and found.shape == (2, 3, 32, 32)


def test_another_unet_hears_the_prompt_and_is_of_our_size():
    pytest.importorskip("diffusers")
    ours, model = CONFIGS["cpu"], room.other_base(CONFIGS["cpu"])
    sizes = [sum(p.numel() for p in each.parameters()) for each in (build(ours), model)]
    assert 1 <= sizes[1] / sizes[0] < 1.2
    prompt = encode_prompts(encoders_of(ours.encoders), ["a red car", "a banana"])
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1: torch.nn.init.normal_(parameter.data, std=0.05)
    x, sigma = torch.randn(2, 3, 32, 32), torch.tensor([0.5, 5.0])
    with torch.no_grad():
        found, swapped = model(x, sigma, prompt=prompt), model(x, sigma, prompt=prompt.select([1, 0]))
    assert found.shape == x.shape and (found - swapped).abs().max() > 1e-4


def test_an_exchanged_prompt_counts_for_what_it_shows(monkeypatch):
    model = build(replace(CONFIGS["cpu"], evaluated=2))
    scenes = understood(model.config, 4)
    truth = draw_emoji(scenes, 32)[0]
    def fake(first, second, level): return level
    monkeypatch.setattr(room, "guided_by_prompt", lambda model, prompt, guidance: None)
    monkeypatch.setattr(room, "switched", fake)
    monkeypatch.setattr(room, "heun", lambda level, noise, grid: truth if level < 1 else truth.roll(1, 0))
    rows = switching_rows(model, scenes, encoders_of(model.config.encoders), 0, 2)
    early, late = rows[0], rows[-1]
    assert early["switch"] == 80 and early["second"] >= 0.75 and early["first"] <= 0.25 and late["first"] >= 0.75 and late["second"] <= 0.25


# ---- published measures

class Made:
    "Samples as `generate_data` writes them."
    def __init__(self, images, folder): self.images, self.folder = images, folder
    def __len__(self): return len(self.images)
    def __getitems__(self, rows): return {"images": self.images[rows]}


def test_scores_of_clip_are_mean_cosines(tmp_path, monkeypatch):
    (tmp_path / "captions.txt").write_text("a\nb\nc\n")
    words, eyes = torch.tensor([[1.0, 0], [0, 2], [3, 3]]), torch.tensor([[2.0, 0], [5, 0], [1, 1]])
    class Half:
        def __init__(self, path, device): assert path == "clip" and device == "cpu"
        def projected(self, captions): return words[["abc".index(text) for text in captions]]
        def encode(self, pictures): return eyes[((pictures[:, 0, 0, 0] + 1) * 127.5).round().long()]
    monkeypatch.setattr(room, "ClipText", Half); monkeypatch.setattr(room, "ClipImage", Half)
    made = Made(torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 3, 4, 4), tmp_path)
    options = dict(prompts=str(tmp_path / "captions.txt"), clip_path="clip", device="cpu", size=2)
    assert measure_clip(made, build(TINY), None, **options)["clip"] == pytest.approx(100 * (1 + 0 + 1) / 3, rel=1e-5)
    for missing in ("prompts", "clip_path"):
        with pytest.raises(ValueError, match=missing): measure_clip(made, build(TINY), None, **options | {missing: ""})
    with pytest.raises(ValueError, match="data_path"): measure_fid(made, build(TINY), "features.pt")


@pytest.mark.parametrize("study", STUDIES)
def test_a_probe_of_each_study_needs_nothing_from_elsewhere(study):
    if study == "another": pytest.importorskip("diffusers")
    found = STUDIES[study]({"study": study, **PROBES[study][0]})
    assert found and all(row for row in found.get("rows", [found]))


def test_who_is_heard_is_who_was_named(monkeypatch):
    for heard, speaking in (("both", {"text", "clip"}), ("text alone", {"text"}), ("bag of words alone", {"clip"}), ("none", set())):
        seen = []
        def painted(model, prompt, guidance, seed, **options): seen.append((prompt, guidance, seed)); return torch.zeros(len(prompt), 3, 32, 32)
        monkeypatch.setattr(room, "paint_all", painted)
        room.study_listening({"heard": heard, "guidance": 7.0, "seed": 2, "count": 3, "understood": True})
        [(prompt, guidance, seed)] = seen
        assert {name for name in ("text", "clip") if getattr(prompt, name).there.any()} == speaking and (len(prompt), guidance, seed) == (3, 7.0, 2)


def test_the_wider_rival_learns_as_long_as_base_and_branches(monkeypatch):
    trained = []
    monkeypatch.setattr(room, "load_data", lambda config: None)
    monkeypatch.setattr(room, "sides", lambda config, base, data: {})
    monkeypatch.setattr(room, "train", lambda config, **options: trained.append(config) or build(config))
    room.arena_sides(TINY)
    base, wider = trained
    assert (base.experts, base.training.steps, wider.experts, wider.training.steps) == (1, TINY.training.steps, 1, TINY.training.steps + steps_of(TINY))
    assert wider.network.width == WIDER["network.width"] and wider.training.batch_size == TINY.training.batch_size
    room.arena_sides(TINY, wider=False)
    assert len(trained) == 3


def painted_by(monkeypatch, **told):
    "Records what is painted; the judge says what it is told to."
    calls = []
    def painted(model, prompt, guidance, seed, regions=None, steps=20, solver="heun", **brush):
        calls.append({"guidance": guidance, "seed": seed, "regions": regions, "steps": steps, "solver": solver, **brush})
        return torch.zeros(len(prompt), 3, 32, 32)
    monkeypatch.setattr(room, "paint_all", painted); monkeypatch.setattr(room, "told", lambda pictures, scenes: dict(told))
    return calls


def test_rivals_are_what_their_names_say(monkeypatch):
    calls = painted_by(monkeypatch, whole=0.5)
    for rival in ("base", "unconditional"): room.study_rivals({"rival": rival, "seed": 1, "count": 2, "understood": True})
    assert [call["guidance"] for call in calls] == [3.0, 0.0]
    assert room.UNETS == {"ours": build, "diffusers": room.other_base}


def test_brushes_of_the_study_are_those_of_its_setting(monkeypatch):
    calls = painted_by(monkeypatch)
    found = room.study_painting({"amount": 0.3, "scale": "std", "seed": 1, "count": 2, "two": False})
    assert [(call["amount"], call["scale"], call["guidance"], call["seed"]) for call in calls] == [(0.3, "std", 3.0, 1)] and calls[0]["regions"].any() and found["rows"][0]["things"] == "one"


def test_sides_are_painted_at_both_guidances(monkeypatch):
    calls = painted_by(monkeypatch, whole=0.25)
    monkeypatch.setattr(room, "sides", lambda config, base, data: {"base": None, "experts": None})
    monkeypatch.setattr(room, "load_data", lambda config: None); monkeypatch.setattr(room, "loss_rows", lambda *given: [])
    rows = room.study_ensemble({"seed": 3, "count": 2, "steps": 5, "smaller": {"encoders.text": "none"}})["rows"]
    assert [(row["side"], row["guidance"]) for row in rows] == [("base", 1.0), ("experts", 1.0), ("base", 3.0), ("experts", 3.0)] and {row["calls"] for row in rows} == {9}
    assert sorted({call["guidance"] for call in calls}) == [1.0, 3.0] and {call["seed"] for call in calls} == {3}


def test_another_unet_learns_at_the_rate_that_is_asked_for(monkeypatch):
    painted_by(monkeypatch, whole=0.5)
    trained = []
    def fit(model, loss, data, training, **options): trained.append((training, loss.keywords["interval"])); return model
    monkeypatch.setattr(room, "fit", fit); monkeypatch.setattr(room, "load_data", lambda config: None)
    monkeypatch.setattr(room, "losses", lambda model, config, scenes: {"low": 1.0, "middle": 2.0, "high": 3.0})
    found = room.study_another({"unet": "ours", "rate": 3e-3, "seed": 4, "count": 2, "smaller": {"encoders.text": "none"}})
    [(training, interval)] = trained
    assert (training.lr, training.seed, training.steps, interval.mass) == (3e-3, 4, ARENA.training.steps, 1)
    assert found["rows"][-1] == {"interval": "all", "loss": pytest.approx(1 / 8 * 1 + 447 / 512 * 2 + 1 / 512 * 3)}


def test_the_second_prompt_is_another_pictures(monkeypatch):
    model, asked = build(replace(CONFIGS["cpu"], evaluated=2)), []
    scenes = understood(model.config, 4)
    monkeypatch.setattr(room, "guided_by_prompt", lambda model, prompt, guidance: (prompt, guidance))
    monkeypatch.setattr(room, "switched", lambda first, second, level: asked.append((first, second, level)))
    monkeypatch.setattr(room, "heun", lambda denoise, noise, grid: noise.clamp(-1, 1))
    switching_rows(model, scenes, encoders_of(model.config.encoders), 0, 2)
    assert [level for *_, level in asked] == list(room.SWITCHES)
    for (first, one), (second, two), _ in asked:
        assert one == two == 3.0 and torch.equal(second.clip.tokens, first.clip.tokens.roll(1, 0)) and torch.equal(second.text.tokens, first.text.tokens.roll(1, 0))
        assert not torch.equal(second.clip.tokens, first.clip.tokens)


def test_hundreds_of_pictures_keep_their_order_and_have_noise_of_their_own(monkeypatch):
    from diffusion_papers.topics.text_unet import Prompt
    calls = []
    def sample(model, count, *, prompt, guidance, steps, solver, brush, seed):
        calls.append((count, seed, brush, guidance, steps, solver)); return prompt.image
    monkeypatch.setattr(room, "sample", sample)
    prompt, regions = Prompt(image=torch.arange(230.0)[:, None]), torch.arange(230.0)[:, None, None, None]
    assert torch.equal(room.paint_all(None, prompt, 2.0, 5, regions, 7, "euler", amount=0.3, scale="std"), prompt.image)
    assert [count for count, *_ in calls] == [100, 100, 30] and len({seed for _, seed, *_ in calls}) == 3 and {call[3:] for call in calls} == {(2.0, 7, "euler")}
    assert torch.equal(torch.cat([brush.regions for _, _, brush, *_ in calls]), regions) and {(brush.amount, brush.scale) for _, _, brush, *_ in calls} == {(0.3, "std")}
    assert room.paint_all(None, prompt, 2.0, 5).shape == (230, 1) and all(brush is None for _, _, brush, *_ in calls[3:])


def test_held_out_scenes_do_not_repeat_their_contents():
    assert len(set(captions_of(held_out(TINY, 60)))) > 4 * TINY.world.contents


def test_binding_is_judged_where_both_things_are_seen():
    pairs = pairs_of(CONFIGS["cpu"], 40)
    assert bound(draw_emoji(replace(pairs, count=torch.ones_like(pairs.count)), 32)[0], pairs)[1] < 0.1


def test_what_cannot_be_judged_has_no_binding():
    pairs = pairs_of(CONFIGS["cpu"], 20)
    assert room.binding_row(torch.zeros(20, 3, 32, 32), pairs) == {"judged": 0.0}
    row = room.binding_row(draw_emoji(pairs, 32)[0], pairs)
    assert row["binding"] > 0.9 and row["judged"] > 0.7


def test_the_expert_for_high_noise_is_kept_beside_its_rivals(monkeypatch, tmp_path):
    from diffusion_papers.workbench.files import read_json
    asked, base = [], build(replace(TINY, experts=1))
    models = {"base": base, "experts": build(TINY), "continued": build(replace(TINY, experts=1)), "rebalanced": build(replace(TINY, experts=1))}
    for number, expert in enumerate([*models["experts"].experts, models["continued"].experts[0], models["rebalanced"].experts[0]]):
        for parameter in expert.parameters(): parameter.data.fill_(number / 64)
    monkeypatch.setattr(room, "load_pretrained", lambda: base)
    monkeypatch.setattr(room, "sides", lambda config, start, data: asked.append((config, start)) or models)
    monkeypatch.setattr(room, "loss_rows", lambda models, config: [{"side": side, "loss": 1.0} for side in models])
    room.keep_sides(tmp_path, **{"training.steps": 3})
    [(config, start)] = asked
    assert (config.experts, config.seed, config.expert.steps, config.branch.steps, config.training.steps) == (3, 0, 250, 25, 3) and start is base.experts[0]
    for side, number in (("expert", 2), ("continued", 3), ("rebalanced", 4)):
        kept = load_model(tmp_path / f"ediffi_{side}.safetensors")
        assert len(kept.experts) == 1 and {parameter.flatten()[0].item() for parameter in kept.parameters()} == {number / 64}
        assert read_json(tmp_path / f"ediffi_{side}.json")["metrics"] == [{"side": side, "loss": 1.0}]


@pytest.fixture
def measured(monkeypatch):
    "Errors of what is kept by side, as a lot of scenes says; the text of a side stands for its network."
    found = {"base": 4.0, "expert": 2.0, "continued": 3.0, "rebalanced": 3.0}
    monkeypatch.setattr(room, "load_pretrained", lambda name="ediffi_base": name.removeprefix("ediffi_"))
    monkeypatch.setattr(room, "ensemble_config", lambda shipped, seed, smaller: (shipped, seed, smaller))
    for name in ("understood", "held_out"): monkeypatch.setattr(room, name, lambda config, count, seed, name=name: (name, config, count, seed))
    monkeypatch.setattr(room, "losses", lambda side, config, scenes, only: {interval: (found[side] if interval == "high" else 9.0) * (1 + 0.1 * (scenes[3] % 3)) for interval in only})
    return found


@pytest.mark.parametrize("strongest", ["rebalanced", "continued"])
def test_the_demonstration_holds_where_the_expert_is_not_behind_the_strongest_rival(monkeypatch, measured, strongest):
    from types import SimpleNamespace
    monkeypatch.setattr(room, "against", lambda claim, runs: SimpleNamespace(rival={"side": strongest}, ratio=0.5))
    monkeypatch.setattr(room, "demonstrated_pictures", dict)
    assert room.demonstrate().holds
    measured[strongest] = 1.9
    shown = room.demonstrate()
    assert not shown.holds and "1.053 +- 0.000 here, 0.500 on more scenes" in shown.verdict
    measured |= {strongest: 2.0, "continued": 2.0}
    assert not room.demonstrate().holds  # a network that goes on is as good


def test_doubt_about_scenes_counts_against_the_demonstration(monkeypatch, measured):
    "A rival that is ahead by less than two standard errors is not ahead; nor is the expert."
    from types import SimpleNamespace
    monkeypatch.setattr(room, "against", lambda claim, runs: SimpleNamespace(rival={"side": "rebalanced"}, ratio=1.0))
    monkeypatch.setattr(room, "demonstrated_pictures", dict)
    ratios = iter([])
    monkeypatch.setattr(room, "over_scenes", lambda ours, theirs: next(ratios))
    for rebalanced, continued, holds in (((1.01, 0.006), (0.98, 0.009), True), ((1.01, 0.004), (0.98, 0.009), False), ((1.01, 0.006), (0.98, 0.011), False)):
        ratios = iter([(1.1, 0.0), (1.0, 0.0), continued, rebalanced])  # base, expert, continued, rebalanced
        assert room.demonstrate().holds == holds


def test_other_scenes_are_others_and_the_expert_is_asked_where_it_is_one(measured):
    rows = room.study_scenes({"seed": 2})["rows"]
    assert [(row["side"], row["interval"]) for row in rows] == [(side, interval) for side in ("base", "expert", "continued", "rebalanced")
                                                                 for interval in room.INTERVALS if side != "expert" or interval == "high"]
    assert {row["loss"] for row in rows if row["side"] == "expert"} == {2.0 * (1 + 0.1 * (1002 % 3))}


def test_the_standard_error_is_that_of_the_mean_ratio():
    lots, steps = [1.0, 4.0, 2.0], [0.0, 0.1, -0.1]
    mean, error = room.over_scenes([lot * (2 + step) for lot, step in zip(lots, steps)], lots)
    assert mean == pytest.approx(2.0) and error == pytest.approx(0.1 / 3**0.5)


def test_only_the_intervals_that_are_asked_for_are_measured():
    scenes, model = room.held_out(TINY, 6), build(TINY)
    everything, only = room.losses(model, TINY, scenes), room.losses(model, TINY, scenes, ("high",))
    assert only == {"high": everything["high"]}


def test_a_stray_cell_is_no_thing(monkeypatch):
    from diffusion_papers.topics.emoji_world import Reading
    scenes, noun = understood(CONFIGS["cpu"], 1), torch.full((1, 16, 16), 558)
    monkeypatch.setattr(room, "read_pictures", lambda judge, pictures: Reading(noun, noun))
    noun[0, 0, :2] = scenes.noun[0, 0]
    assert inside(torch.zeros(1, 3, 32, 32), scenes, halves(1, 32)) == 0  # two cells are none
    noun[0, 0, 2:4] = scenes.noun[0, 0]
    assert inside(torch.zeros(1, 3, 32, 32), scenes, halves(1, 32)) == 1


def test_pictures_are_compared_with_real_ones_of_their_own_size(monkeypatch):
    folders = []
    monkeypatch.setattr(room, "ImageFolder", lambda path, size: folders.append((path, size)))
    monkeypatch.setattr(room, "reference_moments", lambda images, *rest: images())
    monkeypatch.setattr(room, "fid", lambda made, features, reference, **options: 3.0)
    from types import SimpleNamespace
    assert measure_fid(None, SimpleNamespace(config=CONFIGS["sr1024"]), "features.pt", data_path="real") == {"fid": 3.0} and folders == [("real", 1024)]


def _other_unet(config, seed=0):
    "diffusers' network with weights that are not small, a prompt, and pictures."
    model, generator = room.other_base(config), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1: torch.nn.init.normal_(parameter.data, std=0.05, generator=generator)
    return model, encode_prompts(encoders_of(config.encoders), ["a red car", "a banana"]), torch.randn(2, 3, 32, 32, generator=generator)


def test_another_unet_does_not_look_at_padding():
    pytest.importorskip("diffusers")
    import torch.nn.functional as F
    from diffusion_papers.topics.text import TextStates
    model, prompt, x = _other_unet(ARENA.override(**{"encoders.text": "none"}))
    longer = replace(prompt, clip=TextStates(F.pad(prompt.clip.tokens, (0, 0, 0, 3)), F.pad(prompt.clip.there, (0, 3)), prompt.clip.pooling))
    sigma = torch.tensor([0.5, 5.0])
    with torch.no_grad(): assert torch.allclose(model(x, sigma, prompt=prompt), model(x, sigma, prompt=longer), atol=1e-5)



def test_another_unet_hears_the_noise_level():
    pytest.importorskip("diffusers")
    model, prompt, x = _other_unet(ARENA.override(**{"encoders.text": "none"}))
    with torch.no_grad(): near, far = (model.experts[0].network(x, torch.full((2,), label), prompt) for label in (-0.5, 0.5))
    assert (near - far).abs().mean() > 1e-3 * near.abs().mean()


def test_another_unet_begins_as_its_seed_says():
    pytest.importorskip("diffusers")
    one, two, other = (room.other_base(replace(ARENA, seed=seed)).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one) and any(not torch.equal(one[name], other[name]) for name in one)
