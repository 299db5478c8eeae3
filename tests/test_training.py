"""The loop against a plain one, and everything that it follows (courses, orders, random numbers, averages) in plain numbers."""
import copy
import math

from extras import need

need("train")

import pytest
import torch
from torch import nn

from diffusion_papers.core.data import TensorSet
from diffusion_papers.core.training import (Batches, Draws, TrainingConfig, check_sound, checkpoint_due, fit, layout_of, lr_factor, step_seed,
                                            to_device, update_average)


def course(count, **options): return [lr_factor(TrainingConfig(**options), step) for step in range(count)]


def test_a_warm_up_rises_linearly_and_is_over_after_its_steps():
    assert course(6, warmup=4) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1]) and course(3) == [1, 1, 1]


@pytest.mark.parametrize("options, wanted", [
    (dict(decay="linear", steps=5), [1, 0.8, 0.6, 0.4, 0.2]),
    (dict(decay="linear", steps=100, decay_steps=2), [1, 0.5, 0, 0]),
    (dict(decay="cosine", steps=4), [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
    (dict(decay="cosine", steps=100, decay_steps=2), [1, 0.5, 0, 0, 0]),
    (dict(decay="halving", steps=100, decay_steps=2), [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125]),
    (dict(decay="halving", steps=3), [1, 1, 1, 0.5]),
    (dict(decay="linear", steps=4, warmup=4), [0.25, 0.375, 0.375, 0.25])], ids=str)
def test_a_learning_rate_falls_as_its_course_says(options, wanted): assert course(len(wanted), **options) == pytest.approx(wanted, abs=1e-12)


def test_a_checkpoint_is_written_at_multiples_and_at_the_end():
    config = TrainingConfig(steps=7, checkpoint_every=3)
    assert [taken for taken in range(1, 8) if checkpoint_due(config, taken)] == [3, 6, 7]


# order of the data

def indices(size=10, first=0, pieces=1, mine=range(1), **options):
    return list(Batches(size, TrainingConfig(**{"steps": 7, "batch_size": 4, "seed": 3} | options), first, pieces, mine))


def test_every_epoch_shows_all_samples_once_in_an_order_of_its_own():
    flat = [index for batch in indices() for index in batch]
    epochs = flat[:10], flat[10:20]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10)) and len(flat) == 28
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0]) and indices(seed=4) != indices()
    assert epochs[1] == torch.randperm(10, generator=torch.Generator().manual_seed(step_seed(3, 0, 1))).tolist()


def test_batches_go_on_where_they_stopped_and_are_shared_in_pieces():
    assert indices(first=5) == indices()[5:] and len(Batches(10, TrainingConfig(steps=7), 5, 4, range(2, 4))) == 4
    shared = [indices(pieces=4, mine=range(2 * rank, 2 * rank + 2)) for rank in (0, 1)]
    together = [sum((shared[rank][2 * step + piece] for rank in (0, 1) for piece in (0, 1)), []) for step in range(7)]
    assert together == indices() and all(len(piece) == 1 for piece in shared[0])


def test_small_data_are_gone_through_several_times_in_a_batch():
    assert [sorted(batch) for batch in indices(size=2, steps=2)] == [[0, 0, 1, 1]] * 2


# random numbers

def test_one_seed_comes_from_all_numbers_and_their_order():
    seeds = [step_seed(*numbers) for numbers in ((0,), (1,), (0, 1), (2, 1), (0, 0, 1), (1, 2, 3))]
    assert len(set(seeds)) == 6 and all(0 <= seed < 2**63 for seed in seeds) and step_seed(1, 2, 3) == seeds[-1]


def test_pieces_of_a_batch_draw_their_part_of_the_whole():
    whole = Draws(torch.Generator().manual_seed(0)).normal(torch.zeros(6, 2))
    parts = [Draws(torch.Generator().manual_seed(0), 3, piece).normal(torch.zeros(2, 2)) for piece in range(3)]
    assert torch.equal(torch.cat(parts), whole)


def test_draws_are_standard_normal_or_uniform_between_their_ends():
    draws, like = Draws(torch.Generator().manual_seed(0)), torch.zeros(50_000, 2, dtype=torch.float64)
    normal, uniform, plain = draws.normal(like), draws.uniform(like, -3.0, 5.0), draws.uniform(like)
    assert normal.shape == like.shape and normal.dtype == torch.float64
    assert (abs(normal.mean().item()), normal.std().item()) == (pytest.approx(0, abs=0.01), pytest.approx(1, abs=0.01))
    assert uniform.shape == (50_000,) and (uniform.min().item(), uniform.max().item()) == (pytest.approx(-3, abs=0.01), pytest.approx(5, abs=0.01))
    assert uniform.mean().item() == pytest.approx(1, abs=0.05) and plain.min() >= 0 and 0.999 < plain.max() <= 1


# averages

def test_an_average_keeps_its_share_and_copies_buffers():
    average, model = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    with torch.no_grad(): average.weight.fill_(10); model.weight.fill_(20); model.running_mean.fill_(7)
    update_average(average, model, 0.9)
    assert average.weight.item() == pytest.approx(11) and average.running_mean.item() == 7 and model.weight.item() == 20


class Shift(nn.Module):
    "A model of two numbers."
    def __init__(self): super().__init__(); self.place, self.scale = nn.Parameter(torch.tensor([0.5, -1.0])), nn.Parameter(torch.tensor(2.0))


def loss(model, batch, draws):
    "One value a sample, with every kind of random number in it."
    x = batch["x0"] + 0.1 * draws.normal(batch["x0"])
    return draws.uniform(batch["x0"]) * (model.scale * x - model.place).square().sum(1) + torch.rand(()) * model.place.sum()


DATA = TensorSet(torch.randn(10, 2, generator=torch.Generator().manual_seed(0)))


def plain_loop(config, pieces=1):
    "Adam, the average of the weights and the losses, without the package's loop."
    model = Shift()
    average = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer, told = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=config.weight_decay), []
    for step, batch in enumerate(Batches(len(DATA), config)):
        optimizer.param_groups[0]["lr"] = config.lr * lr_factor(config, step)
        optimizer.zero_grad()
        total, x0 = 0.0, DATA[batch]["x0"]
        for piece in range(pieces):
            torch.manual_seed(step_seed(config.seed, 1, step, piece))
            draws, part = Draws(torch.Generator().manual_seed(step_seed(config.seed, 2, step)), pieces, piece), x0.chunk(pieces)[piece]
            value = loss(model, {"x0": part}, draws).mean() / pieces
            value.backward()
            total += value.item()
        norm = math.sqrt(sum(parameter.grad.square().sum().item() for parameter in model.parameters()))
        for parameter in model.parameters(): parameter.grad *= min(1.0, config.clip / norm)
        optimizer.step()
        told.append(total)
        decay = min(config.ema, (1 + step) / (10 + step))
        for name, value in model.named_parameters(): average[name] = decay * average[name] + (1 - decay) * value.detach()
    return model, average, told


@pytest.mark.parametrize("options", [
    dict(ema=0.4), dict(ema=0.99, clip=100.0), dict(clip=0.1, warmup=3, decay="cosine"),
    dict(weight_decay=0.3, decay="halving", decay_steps=4, clip=100.0),
    dict(accumulate=2, ema=0.0)], ids=str)
def test_the_loop_is_adam_with_clipping_a_course_and_an_average(options):
    config, told = TrainingConfig(**{"steps": 12, "batch_size": 4, "lr": 0.05, "seed": 5} | options), []
    model = Shift()
    average = fit(model, loss, DATA, config, device="cpu", callback=lambda step, mean: told.append((step, mean)))
    wanted, wanted_average, losses = plain_loop(config, config.accumulate)
    for (name, value), other in zip(model.named_parameters(), wanted.parameters()):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(dict(average.named_parameters())[name], wanted_average[name], rtol=1e-5, atol=1e-6)
    assert told == [(step + 1, pytest.approx(value, rel=1e-4)) for step, value in enumerate(losses)]
    assert not average.training and not any(parameter.requires_grad for parameter in average.parameters())


def test_a_report_is_the_mean_since_the_last_one():
    "Of 300 steps every third is reported, and the ones where a checkpoint is due."
    told = []
    config = TrainingConfig(steps=300, batch_size=2, lr=1e-12, checkpoint_every=100)
    fit(Shift(), lambda model, batch, draws: batch["x0"][:, 0] + 0 * model.scale, DATA, config, device="cpu",
        callback=lambda *report: told.append(report))
    means = [DATA[batch]["x0"][:, 0].mean().item() for batch in Batches(10, config)]
    ends = [step for step in range(1, 301) if step % 3 == 0 or step % 100 == 0]
    starts = [0, *ends]
    assert [step for step, _ in told] == ends
    assert [mean for _, mean in told] == pytest.approx([sum(means[low:high]) / (high - low) for low, high in zip(starts, ends)], abs=1e-5)


def test_broken_runs_stop_with_the_steps_between_which_they_broke():
    with pytest.raises(FloatingPointError, match="the loss is nan between steps 3 and 5"): check_sound(math.nan, Shift(), 3, 5)
    broken = copy.deepcopy(Shift())
    with torch.no_grad(): broken.scale.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="^scale is not finite after step 5"): check_sound(0.1, broken, 3, 5)
    check_sound(0.1, Shift(), 3, 5)


def test_a_loss_that_breaks_is_found_at_the_next_report():
    "Of 300 steps every third is looked at."
    steps = iter(range(300))
    def breaking(model, batch, draws): return batch["x0"][:, 0] * 0 + model.scale * (math.nan if next(steps) == 4 else 1)
    with pytest.raises(FloatingPointError, match="the loss is nan between steps 4 and 6"):
        fit(Shift(), breaking, DATA, TrainingConfig(steps=300, batch_size=2), device="cpu")


def test_a_batch_that_cannot_be_cut_evenly_is_refused():
    with pytest.raises(ValueError, match="^batch_size: expected a multiple of 3"):
        fit(Shift(), loss, DATA, TrainingConfig(steps=1, batch_size=4, accumulate=3), device="cpu")


def test_more_steps_are_free_where_they_change_none_of_the_first():
    free = lambda **options: "steps" in TrainingConfig(**options).free()
    assert [free(), free(decay="cosine"), free(decay="cosine", decay_steps=9), free(decay="halving")] == [True, False, True, False]
    assert "checkpoint_every" in TrainingConfig().free() and "lr" not in TrainingConfig().free()


def test_pictures_alone_get_their_channels_last():
    batch = to_device({"x0": torch.zeros(2, 3, 4, 4), "class_label": torch.zeros(2)}, "cpu", layout_of(TrainingConfig(channels_last=True)))
    assert batch["x0"].is_contiguous(memory_format=torch.channels_last) and layout_of(TrainingConfig()) == torch.preserve_format
