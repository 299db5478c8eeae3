"""Panoptic segmentation: points, matching, losses, maps, scores; against golden values and other people's programs."""
import contextlib
import io
import itertools
import json
import math
import sys
import warnings
from dataclasses import replace
from pathlib import Path

from extras import need

need("data")

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diffusion_papers.topics import segmentation
from diffusion_papers.topics.segmentation import (
    Instances, Panoptic, PanopticQuality, Segment, assign, bce_costs, bce_loss, category_colour, class_costs, class_loss, confusion_matrix, dice_costs, dice_loss, draw_panoptic, instances,
    mask_ap, mask_losses, masks_at_size, match, match_all, panoptic_map, panoptic_of_masks, pixel_centres, point_draws, query_labels, sample_points, scores, semantic_map, semantic_scores, tally,
    uncertain_points)

GOLDEN = Path(__file__).parent / "golden" / "odise"


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def rows(*scores):
    "Probabilities of queries, the last column is no object."
    return torch.tensor(scores, dtype=torch.float64)


def sure(*bands, width=8):
    "Logits of masks that are sure of a range of columns, and of nothing outside (Q, 2, width)."
    masks = torch.full((len(bands), 2, width), -6.0)
    for mask, (start, stop) in zip(masks, bands): mask[:, start:stop] = 6.0
    return masks


# ---- points

def test_maps_are_read_at_x_and_y_between_pixel_centres():
    maps = torch.arange(8.0).reshape(1, 2, 4)
    assert torch.allclose(sample_points(maps, pixel_centres(2, 4)), maps.flatten(1), atol=1e-6)
    points = torch.tensor([[[0.25, 0.25], [0.125, 0.5], [0.875, 0.75], [0.0, 0.25], [0.875, 1.0]]])  # (x, y); the last two are half a pixel outside
    assert torch.allclose(sample_points(maps, points)[0], torch.tensor([0.5, 2.0, 7.0, 0.0, 3.5]), atol=1e-6)
    both = sample_points(maps.expand(2, 2, 4) + torch.tensor([0.0, 1.0])[:, None, None], points[:, :3])
    assert torch.allclose(both[1], both[0] + 1) and pixel_centres(2, 4)[0, 1].tolist() == [0.375, 0.25]
    half = maps[:, :, :1].bfloat16().expand(1, 2, 400)
    assert torch.allclose(sample_points(half, pixel_centres(2, 400)), half.float().flatten(1), atol=1e-3) and sample_points(half, points).dtype == torch.float32  # the points stay where they are
    assert sample_points(maps > 2, points)[0].tolist() == pytest.approx([0, 0.5, 1, 0, 0.5]) and sample_points(maps.double(), points).dtype == torch.float64
    assert sample_points(maps[:0], points[:, :3]).shape == (0, 3)


def test_the_least_certain_candidates_are_chosen_and_the_others_kept():
    logits = torch.tensor([[[-3.0, -1.0, 0.5, 2.0]], [[0.1, 9.0, -9.0, 9.0]]])
    candidates = pixel_centres(1, 4).expand(2, 4, 2)
    others = torch.tensor([[[0.9, 0.1]], [[0.3, 0.2]]])
    chosen = uncertain_points(logits, candidates, others, 3)
    assert chosen[0].tolist() == [candidates[0, 2].tolist(), candidates[0, 1].tolist(), others[0, 0].tolist()]
    assert torch.equal(chosen[1, 0], candidates[1, 0]) and torch.equal(chosen[1, 2], others[1, 0])


def test_draws_have_their_shares_and_repeat():
    candidates, others = point_draws(2, seeded(), 11)
    assert candidates.shape == (2, 33, 2) and others.shape == (2, 11 - 8, 2) and all(map(torch.equal, point_draws(2, seeded(), 11), (candidates, others)))
    assert candidates.min() >= 0 and candidates.max() <= 1 and point_draws(1, seeded(), 10, 2.0, 1.0)[1].shape == (1, 0, 2) and point_draws(1, seeded())[0].shape == (1, 37632, 2)


# ---- costs and matching

def test_costs_are_the_losses_of_all_pairs():
    logits, targets = 3 * torch.randn(5, 40, generator=seeded(), dtype=torch.float64), (torch.rand(3, 40, generator=seeded(1)) > 0.5).double()
    bce, dice = bce_costs(logits, targets), dice_costs(logits, targets)
    for query, target in np.ndindex(5, 3):
        pair = logits[query:query + 1], targets[target:target + 1]
        assert abs(bce[query, target] - bce_loss(*pair, 1)) < 1e-12 and abs(dice[query, target] - dice_loss(*pair, 1)) < 1e-12
    assert torch.equal(class_costs(rows((0.2, 0.5, 0.3), (0.6, 0.1, 0.3)), torch.tensor([1, 0])), -rows((0.5, 0.2), (0.1, 0.6)))


def test_losses_by_hand():
    logits, targets = torch.tensor([[0.0, 0.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    assert bce_loss(logits, targets, 1).item() == pytest.approx(math.log(2)) and dice_loss(logits, targets, 1).item() == pytest.approx(1 - (2 * 1 + 1) / (2 + 2 + 1))
    assert dice_loss(torch.full((1, 4), -300.0), 0 * targets, 1) == 0  # both empty
    for costs in (bce_costs, dice_costs): assert torch.isfinite(costs(torch.tensor([[300.0, -300.0, 300.0, -300.0]]), targets)).all()
    assert bce_loss(logits.expand(4, 4), targets.expand(4, 4), 2.5).item() == pytest.approx(4 * math.log(2) / 2.5)
    assert dice_loss(logits.expand(4, 4), targets.expand(4, 4), 0.5).item() == pytest.approx(4 * 0.4)  # less than one target counts as one


def test_the_assignment_is_the_best_of_all_orders():
    for cost in torch.rand(200, 4, 4, generator=seeded(), dtype=torch.float64):
        pairs = assign(cost)
        best = min(sum(cost[query, target] for query, target in enumerate(order)) for order in itertools.permutations(range(4)))
        assert pairs.query.tolist() == [0, 1, 2, 3] and cost[pairs.query, pairs.target].sum() == pytest.approx(best.item(), abs=1e-12)
    pairs = assign(torch.tensor([[5.0, 1.0], [1.0, 5.0], [9.0, 0.0]]))
    assert (pairs.query.tolist(), pairs.target.tolist()) == ([1, 2], [0, 1])


def test_more_targets_than_queries_are_told_and_none_are_legal():
    with pytest.warns(UserWarning, match="targets: 3 are more than the 2 queries: 2 are matched"): pairs = assign(torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 0.0]]))
    assert pairs.query.tolist() == [0, 1] and pairs.target.tolist() == [1, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert assign(torch.zeros(3, 3)).query.tolist() == [0, 1, 2] and len(assign(torch.zeros(3, 0)).query) == 0
    empty = match(rows((0.5, 0.5)), sure((0, 4)), torch.zeros(0, dtype=torch.long), torch.zeros(0, 2, 8), pixel_centres(2, 8))
    assert len(empty.query) == 0 and query_labels(empty, torch.zeros(0, dtype=torch.long), 2, 5).tolist() == [5, 5]


def test_each_weight_has_its_cost():
    scores, labels = rows((0.8, 0.1, 0.1), (0.1, 0.8, 0.1)), torch.tensor([0, 1])
    logits = sure((4, 8), (0, 4))  # the masks are exchanged
    masks, points = (sure((0, 4), (4, 8)) > 0).float(), pixel_centres(2, 8)
    for weights, wanted in {(1.0, 0.0, 0.0): [0, 1], (0.0, 1.0, 0.0): [1, 0], (0.0, 0.0, 1.0): [1, 0], (20.0, 1.0, 1.0): [0, 1], (2.0, 5.0, 5.0): [1, 0]}.items():
        assert match(scores, logits, labels, masks, points, weights).target.tolist() == wanted, weights


def test_pictures_matched_together_are_matched_as_alone_and_empty_rows_keep_their_numbers():
    generator = seeded()
    probabilities, logits = torch.rand(3, 4, 6, generator=generator).softmax(-1), torch.randn(3, 4, 6, 8, generator=generator)
    labels, masks = torch.tensor([[0, -1, 2], [-1, 3, 4], [-1, -1, -1]]), torch.rand(3, 3, 12, 10, generator=generator) > 0.5
    points = torch.rand(3, 200, 2, generator=generator)
    for weights in ((2.0, 5.0, 5.0), (9.0, 1.0, 0.1)):
        found = match_all(probabilities, logits, labels, masks, points, weights)
        for number, pairs in enumerate(found):
            rows_there = (labels[number] >= 0).nonzero()[:, 0]
            alone = match(probabilities[number], logits[number], labels[number][rows_there], masks[number][rows_there].float(), points[number:number + 1], weights)
            assert pairs.query.tolist() == alone.query.tolist() and pairs.target.tolist() == rows_there[alone.target].tolist()
    assert [len(pairs.query) for pairs in found] == [2, 2, 0]


def test_points_of_the_matching_are_x_and_y():
    top, left, everything = torch.zeros(1, 8, 8), torch.zeros(1, 8, 8), torch.ones(1, 8, 8)
    top[:, :4], left[:, :, :4] = 1, 1
    points = torch.rand(1, 300, 2, generator=seeded()) * torch.tensor([1.0, 0.4])  # in the upper part, where the target is everywhere
    pairs = match_all(torch.full((1, 2, 2), 0.5), 8 * torch.cat([left, everything])[None] - 4, torch.tensor([[0]]), top[None], points)[0]
    assert pairs.query.tolist() == [1]


def test_a_true_mask_may_have_another_size():
    masks = (sure((0, 4), (4, 8)) > 0)
    large = masks.repeat_interleave(4, 1).repeat_interleave(4, 2)
    pairs = match(rows((0.4, 0.6), (0.4, 0.6)), sure((4, 8), (0, 4)), torch.tensor([0, 0]), large, pixel_centres(5, 5))
    assert pairs.target.tolist() == [1, 0]


# ---- losses

def test_the_loss_of_all_pixel_centres_is_the_dense_loss():
    logits, masks = torch.randn(3, 9, 7, generator=seeded(), requires_grad=True), (torch.rand(3, 9, 7, generator=seeded(1)) > 0.6)
    centres = pixel_centres(9, 7).expand(3, -1, -1)
    losses = mask_losses(logits, masks, centres, centres[:, :0], 63, 3)
    assert losses["bce"].item() == pytest.approx(F.binary_cross_entropy_with_logits(logits, masks.float()).item(), abs=1e-5)
    losses["dice"].backward()
    assert (logits.grad.abs() > 0).all()


def test_no_pairs_have_no_loss_and_a_gradient():
    logits = torch.randn(4, 6, 6, requires_grad=True)
    losses = mask_losses(logits[:0], torch.zeros(0, 12, 12), *point_draws(0, seeded(), 20), 20, 0.0)
    (losses["bce"] + losses["dice"]).backward()
    assert losses["bce"] == 0 and losses["dice"] == 0 and not logits.grad.any()


def test_labels_and_the_weight_of_no_object():
    pairs = segmentation.Matching(torch.tensor([1, 3]), torch.tensor([1, 0]))
    labels = query_labels(pairs, torch.tensor([2, 0]), 4, 3)
    assert labels.tolist() == [3, 0, 3, 2]
    logits = torch.randn(4, 4, generator=seeded(), dtype=torch.float64)
    each = -logits.log_softmax(-1)[torch.arange(4), labels]
    weight = torch.tensor([0.1, 1, 0.1, 1], dtype=torch.float64)
    assert class_loss(logits, labels).item() == pytest.approx(((each * weight).sum() / weight.sum()).item(), abs=1e-12)
    assert class_loss(logits[None], labels[None], 1.0).item() == pytest.approx(each.mean().item(), abs=1e-12)


def test_losses_equal_those_of_transformers():
    theirs = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    logits, targets = 3 * torch.randn(5, 30, generator=seeded()), (torch.rand(5, 30, generator=seeded(1)) > 0.5).float()
    assert torch.allclose(bce_costs(logits, targets[:3]), theirs.pair_wise_sigmoid_cross_entropy_loss(logits, targets[:3]), atol=1e-5)
    assert torch.allclose(dice_costs(logits, targets[:3]), theirs.pair_wise_dice_loss(logits, targets[:3]), atol=1e-5)
    assert torch.allclose(bce_loss(logits, targets, 3), theirs.sigmoid_cross_entropy_loss(logits, targets, 3), atol=1e-5)
    assert torch.allclose(dice_loss(logits, targets, 3), theirs.dice_loss(logits, targets, 3), atol=1e-5)
    maps, points = torch.randn(2, 6, 9, generator=seeded()), torch.rand(2, 20, 2, generator=seeded(1))
    assert torch.allclose(sample_points(maps, points), theirs.sample_point(maps[:, None], points, align_corners=False)[:, 0], atol=1e-6)


# ---- maps

def test_masks_come_to_the_size_of_the_picture_without_padding():
    logits = torch.zeros(1, 4, 4)
    logits[:, :, 2:] = 8.0  # the padding lies at the right
    out = masks_at_size(logits, (8, 8), (8, 3), (16, 6))
    assert out.shape == (1, 16, 6) and not out.any()
    assert torch.allclose(masks_at_size(torch.tensor([[[0.0, 4.0]]]), (1, 4), (1, 4), (1, 4))[0, 0], torch.tensor([0.0, 1.0, 3.0, 4.0]))


def test_all_queries_vote_for_the_semantic_map():
    scores, logits = rows((0.5, 0.2, 0.3), (0.1, 0.7, 0.2)), torch.tensor([[[0.0, 2.0]], [[-1.0, 1.0]]], dtype=torch.float64)
    sigma = logits.sigmoid()
    expected = torch.stack([0.5 * sigma[0] + 0.1 * sigma[1], 0.2 * sigma[0] + 0.7 * sigma[1]])
    assert torch.allclose(semantic_map(scores, logits), expected, atol=1e-12)


def test_owners_draw_where_they_are_solid():
    logits = torch.tensor([[[6.0, 6.0, -1.0, 6.0]], [[-6.0, 1.0, -6.0, 6.0]]])
    seen = panoptic_map(rows((0.6, 0.1, 0.3), (0.1, 0.9, 0.0)), logits, {0}, overlap=0.0)
    assert seen.ids.tolist() == [[1, 2, 0, 2]]  # pixel 1: 0.9 * 0.73 is more than 0.6; pixel 2 is owned by a query that is not solid there
    assert seen.segments == [Segment(1, 0, True, pytest.approx(0.6), 1), Segment(2, 1, False, pytest.approx(0.9), 2)]


def test_queries_of_no_object_and_of_low_scores_take_no_part():
    scores, logits = rows((0.5, 0.2, 0.3), (0.2, 0.3, 0.5), (0.25, 0.5, 0.25)), sure((0, 3), (0, 8), (3, 8))
    assert [segment.category for segment in panoptic_map(scores, logits, {0, 1}).segments] == [0, 1]
    assert panoptic_map(scores, logits, {0, 1}, 0.49).ids.unique().tolist() == [1, 2]
    none = panoptic_map(scores, logits, {0, 1}, 0.5)  # the threshold itself is not above the threshold
    assert none.segments == [] and none.ids.shape == (2, 8) and not none.ids.any()


def test_a_query_that_lost_its_mask_is_dropped_and_nobody_inherits():
    scores, logits = rows((0.9, 0.1), (0.6, 0.4)), sure((0, 5), (2, 8))  # the second owns 3 of its 6 columns
    assert panoptic_map(scores, logits, {0}, overlap=0.5).ids[0].tolist() == [1] * 5 + [2] * 3
    assert panoptic_map(scores, logits, {0}, overlap=0.51).ids[0].tolist() == [1] * 5 + [0] * 3


def test_owned_pixels_count_although_they_are_not_drawn():
    logits = sure((0, 2))[..., :4]
    logits[..., 2:] = -1.0  # owned, for lack of others, and not solid: 4 of 2
    seen = panoptic_map(rows((0.9, 0.1)), logits, {0}, overlap=1.0)
    assert seen.ids[0].tolist() == [1, 1, 0, 0] and seen.segments[0].area == 4


def test_stuff_is_merged_and_things_are_not():
    scores, logits = rows((0.6, 0.1, 0.3), (0.1, 0.7, 0.2), (0.8, 0.1, 0.1)), sure((0, 2), (2, 4), (6, 8))
    merged = panoptic_map(scores, logits, {1})
    assert merged.ids[0].tolist() == [1, 1, 2, 2, 0, 0, 1, 1] and merged.segments == [Segment(1, 0, False, pytest.approx(0.8), 8), Segment(2, 1, True, pytest.approx(0.7), 4)]
    assert panoptic_map(scores, logits, {0, 1}).ids[0].tolist() == [1, 1, 2, 2, 0, 0, 3, 3]
    lost = panoptic_map(rows((0.6, 0.1, 0.3), (0.1, 0.7, 0.2), (0.5, 0.1, 0.4)), sure((0, 2), (2, 6), (4, 8)), {1})  # the second part of the stuff fails the test
    assert lost.ids[0].tolist() == [1, 1, 2, 2, 2, 2, 0, 0] and lost.segments[0].area == 4


def test_raising_the_overlap_never_keeps_more():
    for seed in range(20):
        logits = F.interpolate(4 * torch.randn(1, 8, 4, 4, generator=seeded(seed)), size=(16, 16), mode="bilinear")[0]
        scores = (2 * torch.randn(8, 5, generator=seeded(seed + 100))).softmax(-1)
        kept = [panoptic_map(scores, logits, range(4), overlap=overlap) for overlap in (0.0, 0.3, 0.6, 0.8, 1.0)]
        counts = [len(panoptic.segments) for panoptic in kept]
        assert counts == sorted(counts, reverse=True)
        score, category = scores.max(1)
        score = torch.where(category < 4, score, 0.0)
        owner = (score[:, None, None] * logits.sigmoid()).argmax(0)
        assert counts[0] == sum(bool(((owner == query) & (logits[query] >= 0)).any()) for query in range(8) if score[query] > 0)  # 0 keeps all that draw something
        for panoptic in kept:
            assert [segment.id for segment in panoptic.segments] == list(range(1, len(panoptic.segments) + 1))
            assert all((panoptic.ids == segment.id).sum() == segment.area > 0 for segment in panoptic.segments)


def test_golden_segments():
    arrays, about = np.load(GOLDEN / "inference.npz"), json.loads((GOLDEN / "inference.json").read_text())
    seen = panoptic_map(torch.from_numpy(arrays["mask_cls"]).softmax(-1), torch.from_numpy(arrays["mask_pred"]), about["things"])
    assert [{"id": s.id, "isthing": s.thing, "category_id": s.category} for s in seen.segments] == about["segments_info"]


def test_instances_are_ranked_pairs_of_query_and_category():
    scores, logits = rows((0.5, 0.3, 0.1, 0.1), (0.15, 0.05, 0.75, 0.05)), torch.tensor([[[2.0, -2.0, 0.0]], [[1.0, 1.0, -1.0]]], dtype=torch.float64)
    high, low = torch.tensor([2.0, 1.0], dtype=torch.float64).sigmoid().tolist()
    found = instances(scores, logits, {0, 1})
    assert found.category.tolist() == [0, 1, 0, 1] and torch.allclose(found.score, rows(0.5 * high, 0.3 * high, 0.15 * low, 0.05 * low), atol=1e-5)
    assert found.mask[0].tolist() == [[True, False, False]] and found.mask[2].tolist() == [[True, True, False]] and found.mask.dtype == torch.bool
    assert len(instances(scores, logits, {0, 1}, top=2).score) == 1  # the best of all is stuff, and takes a place
    close = instances(rows((0.50, 0.50), (0.52, 0.48)), torch.tensor([[[8.0]], [[0.1]]]).double(), {0})
    assert close.score[0] > 0.49 and close.mask.all() and close.score.tolist() == sorted(close.score.tolist(), reverse=True)  # certainty changes the order
    assert instances(scores, logits - 9, {0}).score.tolist() == [0, 0]  # empty masks


def test_truths_are_made_of_masks():
    masks = torch.zeros(4, 2, 4)
    masks[0, :, :1], masks[1, :, 1:2], masks[2, :, 2], masks[0, :, 2] = 1, 1, 0.5, 0.5
    masks[3, :, 3] = 0.6
    made = panoptic_of_masks(masks, [2, 1, 1, 2], {1}, crowds={1})
    assert made.ids[0].tolist() == [1, 2, 0, 1] and made.segments == [Segment(1, 2, False, area=4), Segment(2, 1, True, area=2, crowd=True)]
    assert len(panoptic_of_masks(masks, [1, 1, 1, 1], {1}).segments) == 3


# ---- panoptic quality

def listed(ids, *segments): return Panoptic(torch.tensor(ids), [Segment(*parts) for parts in segments])


def quality_of(pairs, categories=(1, 2), things=(1,)):
    quality = PanopticQuality(categories, things)
    for predicted, truth in pairs: quality.add(predicted, truth)
    return quality


def test_quality_by_hand():
    truth = listed([[1, 1, 1, 1, 2, 2, 2, 2]], (1, 1), (2, 2))
    seen = listed([[5, 5, 5, 6, 7, 7, 7, 7]], (5, 1), (6, 1), (7, 2))
    quality = quality_of([(seen, truth)])
    assert quality.sums.tolist() == [[0.75, 1, 1, 0], [1.0, 1, 0, 0]] and quality.images == 1
    assert quality.per_class() == {1: (0.75 / 1.5, 0.75, 1 / 1.5, 1), 2: (1, 1, 1, 1)}
    assert quality.result()["all"] == pytest.approx((0.75, 0.875, 5 / 6, 2)) and quality.result()["things"] == pytest.approx((0.5, 0.75, 2 / 3, 1)) and quality.result()["stuff"] == (1, 1, 1, 1)


def test_half_is_not_enough_and_categories_must_agree():
    truth = listed([[1, 1, 1, 1]], (1, 1))
    assert quality_of([(listed([[3, 3, 4, 4]], (3, 1), (4, 1)), truth)]).sums[0].tolist() == [0, 0, 2, 1]
    wrong = quality_of([(listed([[3, 3, 3, 3]], (3, 2)), truth)])
    assert wrong.sums.tolist() == [[0, 0, 0, 1], [0, 0, 1, 0]] and wrong.result()["all"] == (0, 0, 0, 2)


def test_void_of_the_truth_is_unknown_and_void_of_the_answer_is_missed():
    truth = listed([[1, 1, 0, 0, 0, 0]], (1, 1))
    assert quality_of([(listed([[3, 3, 3, 3, 3, 4]], (3, 1), (4, 1)), truth)]).sums[0].tolist() == [1, 1, 0, 0]  # the union leaves void out; 4 is forgiven
    assert quality_of([(listed([[0, 3, 3, 0, 0, 0]], (3, 1)), truth)]).sums[0].tolist() == [0, 0, 1, 1]  # half on void is not more than half
    assert quality_of([(listed([[3, 0, 0, 0, 0, 0]], (3, 1)), listed([[1, 1, 1, 0, 0, 0]], (1, 1)))]).sums[0].tolist() == [0, 0, 1, 1]


def test_crowds_are_neither_found_nor_missed():
    truth = listed([[1, 1, 1, 1, 2, 2]], (1, 1, True, None, 0, True), (2, 2))
    assert quality_of([(listed([[3, 3, 3, 3, 4, 4]], (3, 1), (4, 2)), truth)]).sums.tolist() == [[0, 0, 0, 0], [1, 1, 0, 0]]
    assert quality_of([(listed([[3, 3, 3, 3, 4, 4]], (3, 2), (4, 2)), truth)]).sums[1].tolist() == [1, 1, 1, 0]  # the crowd forgives its own category alone
    assert set(quality_of([(listed([[0, 0, 0, 0, 4, 4]], (4, 2)), truth)]).per_class()) == {2}


def test_sums_run_over_the_set():
    truth, empty = listed([[1, 1]], (1, 1)), listed([[0, 0]])
    quality = quality_of([(truth, truth)] * 9 + [(empty, truth)])
    assert quality.result()["all"].pq == pytest.approx(9 / 9.5) and quality.images == 10
    assert math.isnan(quality.result()["stuff"].pq) and quality.result()["stuff"].classes == 0


def golden_pairs():
    arrays, about = np.load(GOLDEN / "panoptic_quality.npz"), json.loads((GOLDEN / "panoptic_quality.json").read_text())
    things = [c["id"] for c in about["categories"] if c["isthing"]]
    read = lambda ids, segments: Panoptic(ids.astype(int), [Segment(s["id"], s["category_id"], s["category_id"] in things, crowd=bool(s.get("iscrowd", 0))) for s in segments])
    pairs = [(read(pred, ours), read(gt, theirs)) for pred, gt, ours, theirs in zip(arrays["pred"], arrays["gt"], about["pred_segments"], about["gt_segments"])]
    return pairs, [c["id"] for c in about["categories"]], things, about


def test_golden_quality():
    pairs, categories, things, about = golden_pairs()
    quality = quality_of(pairs, categories, things)
    for name, stored in about["result"].items(): assert quality.result()[name.lower()] == pytest.approx((stored["pq"], stored["sq"], stored["rq"], stored["n"]), abs=1e-9)
    for category, found in quality.per_class().items():
        stored = about["per_category"][str(category)]
        assert found[:3] == pytest.approx((stored["pq"], stored["sq"], stored["rq"]), abs=1e-9) and abs(found.pq - found.sq * found.rq) < 1e-12


def test_other_names_for_categories_and_segments_change_nothing():
    pairs, categories, things, _ = golden_pairs()
    renamed = lambda p: Panoptic(np.where(p.ids > 0, 1000 - p.ids, 0), [replace(s, id=1000 - s.id, category=50 - s.category) for s in reversed(p.segments)])
    before, after = quality_of(pairs, categories, things), quality_of([tuple(map(renamed, pair)) for pair in pairs], [50 - c for c in categories], [50 - c for c in things])
    assert after.per_class().keys() == {50 - category for category in before.per_class()}
    for category, value in before.per_class().items(): assert after.per_class()[50 - category] == pytest.approx(value, abs=1e-12)


def test_what_is_perfect_has_quality_one():
    pairs, categories, things, _ = golden_pairs()
    perfect = [Panoptic(truth.ids, [replace(segment, crowd=False) for segment in truth.segments]) for _, truth in pairs]
    assert quality_of([(truth, truth) for truth in perfect], categories, things).result()["all"] == (1, 1, 1, 5)


def random_pair(random, side=12, crowds=True, void=True):
    "A label map of blocks with a spoiled copy, categories 1 to 5, at most one crowd a category."
    blocks = random.integers(0 if void else 1, 7, (side // 3, side // 3))
    truth = blocks.repeat(3, 0).repeat(3, 1)
    seen = np.where(random.random(truth.shape) < random.choice([0.02, 0.15, 0.3]), random.integers(0 if void else 1, 8, truth.shape), truth)
    if random.random() < 0.3: seen = np.where(seen == 6, 1, seen)
    kinds, crowded = {number: int(random.integers(1, 6)) for number in range(1, 8)}, set()
    def segments(ids, kinds, crowds):
        for number in np.unique(ids[ids > 0]).tolist():
            crowd = crowds and kinds[number] not in crowded and random.random() < 0.3
            if crowd: crowded.add(kinds[number])
            yield Segment(number, kinds[number], crowd=bool(crowd))
    theirs = Panoptic(truth, list(segments(truth, kinds, crowds)))
    changed = {number: kind if random.random() < 0.8 else int(random.integers(1, 6)) for number, kind in kinds.items()}
    return Panoptic(seen, list(segments(seen, changed, False))), theirs


def test_quality_equals_the_reference_program_with_void_and_crowds(tmp_path):
    reference, image = pytest.importorskip("panopticapi.evaluation"), pytest.importorskip("PIL.Image")
    random = np.random.default_rng(0)
    pairs, notes = [random_pair(random) for _ in range(200)], []
    for number, pair in enumerate(pairs):
        both = []
        for side, panoptic in zip(("seen", "truth"), pair):
            (tmp_path / side).mkdir(exist_ok=True)
            image.fromarray(np.stack([panoptic.ids, 0 * panoptic.ids, 0 * panoptic.ids], -1).astype(np.uint8)).save(tmp_path / side / f"{number}.png")
            both.append({"image_id": number, "file_name": f"{number}.png", "segments_info": [
                {"id": s.id, "category_id": s.category, "iscrowd": int(s.crowd), "area": int((panoptic.ids == s.id).sum())} for s in panoptic.segments]})
        notes.append(both[::-1])
    categories = {number: {"id": number, "isthing": int(number < 3)} for number in range(1, 6)}
    with contextlib.redirect_stdout(io.StringIO()): counted = reference.pq_compute_single_core(0, notes, str(tmp_path / "truth"), str(tmp_path / "seen"), categories)
    mine = quality_of(pairs, range(1, 6), (1, 2))
    for place, number in enumerate(range(1, 6)):
        stored = counted[number]
        assert mine.sums[place, 1:].tolist() == [stored.tp, stored.fp, stored.fn] and mine.sums[place, 0] == pytest.approx(stored.iou, abs=1e-9) and min(stored.tp, stored.fp, stored.fn) > 10
    for name, kind in (("all", None), ("things", True), ("stuff", False)):
        stored = counted.pq_average(categories, kind)[0]
        assert mine.result()[name] == pytest.approx((stored["pq"], stored["sq"], stored["rq"], stored["n"]), abs=1e-9)


@pytest.mark.filterwarnings("ignore")
def test_quality_equals_torchmetrics_without_void_and_crowds():
    theirs = pytest.importorskip("torchmetrics.detection").PanopticQuality(things={1, 2}, stuffs={3, 4, 5})
    random, pairs = np.random.default_rng(1), []
    for _ in range(40):
        pair = []
        for panoptic in random_pair(random, crowds=False, void=False):
            kinds = {segment.id: segment.category for segment in panoptic.segments}
            first = {}
            ids = np.vectorize(lambda number: number if kinds[number] < 3 else first.setdefault(kinds[number], number))(panoptic.ids)  # stuff is merged
            pair.append(Panoptic(ids, [Segment(number, kinds[number]) for number in np.unique(ids).tolist()]))
        pairs.append(pair)
        stacked = [torch.from_numpy(np.stack([np.vectorize({s.id: s.category for s in p.segments}.get)(p.ids), np.where(np.isin(p.ids, [s.id for s in p.segments if s.category < 3]), p.ids, 0)], -1))[None]
                   for p in pair]
        theirs.update(*stacked)
    assert quality_of(pairs, range(1, 6), (1, 2)).result()["all"].pq == pytest.approx(theirs.compute().item(), abs=1e-6)


@pytest.mark.parametrize("predicted, error, words", [
    (listed([[1, 2]], (1, 1)), KeyError, "predicted, image 7: segment 2 is in the map and not in the list"), (listed([[1, 1]], (1, 1), (3, 1)), KeyError, "segment 3 is in the list and not in the map"),
    (listed([[1, 1]], (1, 9)), KeyError, "segment 1 has the unknown category 9"), (listed([[1, 1]], (1, 1), (1, 1)), ValueError, "different segment ids"), (listed([[0, 0]], (0, 1)), ValueError, "none that is 0"),
    (listed([[1, 1, 1]], (1, 1)), ValueError, r"expected a map of size \(1, 2\)"), (Panoptic(torch.ones(1, 2), [Segment(1, 1)]), ValueError, "whole numbers"), (Panoptic(torch.ones(2, dtype=int), [Segment(1, 1)]), ValueError, "whole numbers")])
def test_wrong_maps_are_refused_and_count_nothing(predicted, error, words):
    truth, quality = listed([[1, 1]], (1, 1)), PanopticQuality([1, 2], [1])
    with pytest.raises(error, match=words): quality.add(predicted, truth, 7)
    assert not quality.sums.any() and quality.images == 0
    if error is KeyError:
        with pytest.raises(KeyError, match=words.replace("predicted", "truth").replace("image 7", "image 0")): quality.add(truth, predicted)


# ---- semantic scores

def test_semantic_scores_by_hand():
    confusion = confusion_matrix([0, 0, 1, 1, 1, 3, 9], [0, 0, 0, 1, 1, 1, 9], 4, ignore=9)
    assert confusion.tolist() == [[2, 1, 0, 0, 0], [0, 2, 0, 1, 0], [0] * 5, [0] * 5]
    scores = semantic_scores(confusion)
    assert scores[:5] == pytest.approx((((2 / 3) + (2 / 4)) / 2, 0.5 * 2 / 3 + 0.5 * 2 / 4, 2 / 3, 4 / 6, 2)) and np.isnan(scores.iou).tolist() == [False, False, True, True]
    zero = semantic_scores(confusion, "zero")
    assert zero[:5] == pytest.approx((((2 / 3) + (2 / 4)) / 4, scores.fwiou, 1 / 3, 4 / 6, 4))
    uneven = semantic_scores(confusion_matrix([0, 1, 1, 0], [0, 1, 1, 1], 2))
    assert uneven[:4] == pytest.approx((0.5 * (1 / 2 + 2 / 3), 0.25 / 2 + 0.75 * 2 / 3, 0.5 * (1 + 2 / 3), 3 / 4))


def test_what_pictures_add_up_to_is_what_the_measures_say():
    generator, things = seeded(3), {0, 1, 2}
    quality, confusion, total = PanopticQuality(range(5), things), 0, 0
    for picture in range(6):
        truth = Panoptic(torch.randint(0, 5, (3, 4), generator=generator).repeat_interleave(4, 0).repeat_interleave(4, 1), [])
        kinds = torch.randint(0, 5, (5,), generator=generator).tolist()
        listed = [number for number in range(1, 5) if (truth.ids == number).any()]
        truth = Panoptic(truth.ids, [Segment(number, kinds[number], kinds[number] in things, crowd=number == 4) for number in listed])
        masks = 6 * torch.stack([(truth.ids == number).float() - 0.5 for number in listed] + [torch.randn(12, 16, generator=generator)])
        said = 0.3 + torch.nn.functional.one_hot(torch.tensor([(kinds[number] + number * picture) % 5 for number in listed] + [5]), 6) + 0.6 * torch.rand(len(masks), 6, generator=generator)
        said = said / said.sum(1, keepdim=True)
        total = total + tally(said, masks, truth, things)
        quality.add(panoptic_map(said, masks, things), truth)
        category = torch.full((5,), 5)
        for part in truth.segments: category[part.id] = 5 if part.crowd else part.category
        confusion = confusion + confusion_matrix(semantic_map(said, masks).argmax(0), category[truth.ids], 5, 5)
    found, each = scores(total), quality.per_class()
    assert found["PQ"] == pytest.approx(100 * quality.result()["all"].pq) and found["mIoU"] == pytest.approx(100 * semantic_scores(confusion).miou) and found["SQ"] == pytest.approx(100 * quality.result()["all"].sq)
    for number in range(5):
        alone = scores(total, torch.arange(5) == number)
        if number in each: assert alone["PQ"] == pytest.approx(100 * each[number].pq) and alone["RQ"] == pytest.approx(100 * each[number].rq)


def test_names_are_ranked_by_the_mask_that_overlaps_most():
    truth = Panoptic(torch.tensor([[1, 1, 1, 1, 2, 2, 0, 3]] * 2), [Segment(1, 0, True), Segment(2, 1, True), Segment(3, 2, True, crowd=True)])
    masks = sure((0, 3), (0, 8), (4, 6))  # the second covers everything, and overlaps less
    said = torch.full((3, 8), 0.01)
    said[0, 0], said[0, 1], said[0, 7] = 0.3, 0.4, 0.6  # second among the names; no object is none
    said[1, 0] = 0.9
    said[2, 2:7], said[2, 1] = torch.tensor([0.3, 0.29, 0.28, 0.27, 0.26]), 0.2  # sixth
    sums = tally(said / said.sum(1, keepdim=True), masks, truth, {0, 1, 2})[:, -3:]
    assert sums[:3].tolist() == [[1, 0, 1], [1, 0, 0], [0, 0, 0]]
    said[0, 0] = 0.5
    assert tally(said / said.sum(1, keepdim=True), masks, truth, {0, 1, 2})[0, -3:].tolist() == [1, 1, 1]


def test_unknown_pixels_never_matter_and_no_answer_is_a_miss():
    random = np.random.default_rng(0)
    truth, seen = random.integers(0, 4, (8, 8)), random.integers(0, 4, (8, 8))
    truth[random.random((8, 8)) < 0.3] = 255
    other = np.where(truth == 255, random.integers(-5, 99, (8, 8)), seen)
    assert (confusion_matrix(seen, truth, 4) == confusion_matrix(torch.from_numpy(other), torch.from_numpy(truth), 4)).all()
    missing = semantic_scores(confusion_matrix(torch.tensor([0, 255]), torch.tensor([0, 0], dtype=torch.uint8), 2))
    assert missing.iou[0] == 0.5 and missing.pacc == 0.5 and missing.classes == 1


# ---- average precision

def single(score, category, mask): return Instances(torch.tensor([score]), torch.tensor([category]), torch.tensor(mask, dtype=torch.bool)[None])


def test_average_precision():
    pytest.importorskip("pycocotools")
    truth = listed([[1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3]], (1, 0), (2, 1), (3, 2, False))
    mask = lambda number: (truth.ids == number).tolist()
    both = Instances(torch.tensor([0.9, 0.8]), torch.tensor([0, 1]), torch.stack([truth.ids == 1, truth.ids == 2]))
    assert mask_ap([both], [truth], {0, 1}) == pytest.approx({"AP": 1.0, "AP50": 1.0, "AP75": 1.0})
    assert mask_ap([single(0.9, 0, mask(1))], [truth], {0, 1})["AP"] == pytest.approx(0.5) and mask_ap([single(0.9, 1, mask(1))], [truth], {0, 1})["AP"] == 0
    part = mask_ap([single(0.9, 0, [[1, 1, 1, 0], [0] * 4, [0] * 4])], [truth], {0})  # an IoU of 0.75 passes six of ten thresholds
    assert part == pytest.approx({"AP": 0.6, "AP50": 1.0, "AP75": 1.0})
    worse = Instances(torch.tensor([0.9, 0.5]), torch.tensor([0, 0]), torch.stack([truth.ids == 2, truth.ids == 1]))  # a wrong one ranks first
    assert mask_ap([worse], [truth], {0})["AP50"] == pytest.approx(0.5) and mask_ap([Instances(worse.score.flip(0), worse.category, worse.mask)], [truth], {0})["AP50"] == pytest.approx(1)
    nothing = Instances(torch.zeros(0), torch.zeros(0, dtype=torch.long), torch.zeros(0, 3, 4, dtype=torch.bool))
    assert mask_ap([nothing], [truth], {0})["AP"] == 0 and math.isnan(mask_ap([nothing], [truth], {5})["AP"])
    crowd = Panoptic(truth.ids, [replace(truth.segments[0], crowd=True), *truth.segments[1:]])
    assert mask_ap([both], [crowd], {0, 1})["AP"] == pytest.approx(1) and math.isnan(mask_ap([both], [crowd], {0})["AP"])
    assert mask_ap([both, nothing], [truth, truth], {0, 1})["AP"] == pytest.approx(51 / 101)  # recall stops at one half


def test_a_missing_program_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("pycocotools")]: monkeypatch.delitem(sys.modules, name)
    class Hidden:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.startswith("pycocotools"): raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    monkeypatch.setattr(sys, "meta_path", [Hidden, *sys.meta_path])
    with pytest.raises(ImportError, match=r"pip install 'diffusion_papers\[segmentation\]'"): mask_ap([], [], {0})


# ---- pictures

def test_colours_are_stable_and_apart():
    colours = np.array([category_colour(number) for number in range(20)], dtype=float)
    gaps = np.linalg.norm(colours[:, None] - colours, axis=-1) + 1000 * np.eye(20)
    assert gaps.min() > 40 and category_colour(3) == tuple(colours[3].astype(int)) and category_colour(0) == (242, 61, 61)


def test_a_map_is_drawn_with_its_legend():
    picture = torch.zeros(3, 12, 12)
    ids = torch.zeros(12, 12, dtype=torch.long); ids[:, :6] = 1; ids[:4, 6:] = 2
    drawn = draw_panoptic(picture, Panoptic(ids, [Segment(1, 4, True, 0.87), Segment(2, 0, False)]), {0: "sky", 4: "a very long name of a category"}, scale=10)
    again = draw_panoptic(picture, Panoptic(ids, [Segment(1, 0, True, 0.87), Segment(2, 4, False)]), {0: "sky", 4: "cat"}, scale=10)
    assert drawn.dtype == np.uint8 and drawn.shape[0] == 120 and drawn.shape[1] > again.shape[1] > 120
    paint = lambda number: np.round(0.4 * 127.5 + 0.6 * np.array(category_colour(number)))
    assert (np.abs(drawn[100, 20] - paint(4)) <= 1).all() and (np.abs(again[5, 70] - paint(4)) <= 1).all() and (np.abs(drawn[5, 70] - paint(0)) <= 1).all()
    void = drawn[60:115, 65:115].mean(-1)
    assert void.std() > 40 and set(np.unique(void)) == {66, 189}  # stripes, dark and light
    assert (drawn[20:100, 59] == 255).all() and drawn[100, 58].tolist() != [255] * 3  # a line between segments
    legend = drawn[:, 122:]
    assert (legend[-3:] == 250).all() and legend.min() < 60  # dark words on a light ground of its own
    assert draw_panoptic(picture, Panoptic(ids * 0, []), {}, scale=1).shape[0] == 30  # the legend alone needs more


# ---- what is wrong

HALF, FLAT = torch.full((2, 3), 1 / 3), torch.zeros(2, 4, 4)


@pytest.mark.parametrize("wrong, error, words", [
    (lambda: panoptic_map(HALF.log(), FLAT, {0}), ValueError, "probabilities: expected rows that sum to 1"), (lambda: semantic_map(2 * HALF, FLAT), ValueError, "rows that sum"), (lambda: instances(HALF, FLAT[:1], {0}), ValueError, "logits"),
    (lambda: semantic_map(HALF[:, :1] * 3, FLAT), ValueError, "at least one category"), (lambda: panoptic_map(HALF, FLAT * math.nan, {0}), ValueError, "logits: expected finite"), (lambda: panoptic_map(HALF, FLAT[0], {0}), ValueError, "dimensions"),
    (lambda: panoptic_map(HALF, FLAT, {2}), ValueError, "things"), (lambda: instances(HALF, FLAT, {-1}), ValueError, "things"), (lambda: instances(HALF, FLAT, {0}, 0), ValueError, "top"),
    (lambda: panoptic_map(HALF, FLAT, {0}, 1.5), ValueError, "object_score"), (lambda: panoptic_map(HALF, FLAT, {0}, overlap=-0.1), ValueError, "overlap"),
    (lambda: match(HALF, FLAT, torch.tensor([0, 1]), FLAT + 0.5, pixel_centres(4, 4)), ValueError, "binary, target 0"), (lambda: match(HALF, FLAT, torch.tensor([0, 2]), FLAT, pixel_centres(4, 4)), ValueError, "category from 0 to 1, target 1"),
    (lambda: match(HALF, FLAT, torch.tensor([0]), FLAT, pixel_centres(4, 4)), ValueError, "targets"), (lambda: match(HALF, FLAT, torch.tensor([0.0, 1.0]), FLAT, pixel_centres(4, 4)), TypeError, "labels"),
    (lambda: assign(torch.tensor([[math.nan]])), ValueError, "cost"), (lambda: sample_points(FLAT, torch.zeros(3, 5, 2)), ValueError, "points"), (lambda: sample_points(FLAT, torch.zeros(1, 5, 3)), ValueError, "points"),
    (lambda: uncertain_points(FLAT, torch.zeros(2, 3, 2), torch.zeros(2, 2, 2), 6), ValueError, "points: expected 2 to 5"), (lambda: uncertain_points(FLAT, torch.zeros(2, 3, 2), torch.zeros(2, 2, 2), 1), ValueError, "points"),
    (lambda: point_draws(1, seeded(), 0), ValueError, "points"), (lambda: point_draws(1, seeded(), importance=1.5), ValueError, "importance"), (lambda: point_draws(1, seeded(), oversample=0.5), ValueError, "oversample"),
    (lambda: mask_losses(FLAT, FLAT[:1], torch.zeros(2, 3, 2), torch.zeros(2, 1, 2), 2, 1), ValueError, "masks"), (lambda: mask_losses(FLAT, FLAT, torch.zeros(2, 3, 2), torch.zeros(2, 1, 2), 2, math.nan), ValueError, "count"),
    (lambda: masks_at_size(FLAT, (8, 8), (9, 8), (4, 4)), ValueError, "content"), (lambda: panoptic_of_masks(FLAT, [0], {0}), ValueError, "categories"),
    (lambda: PanopticQuality([], []), ValueError, "categories"), (lambda: PanopticQuality([1, 1], []), ValueError, "categories"), (lambda: PanopticQuality([1], [2]), ValueError, "things"),
    (lambda: confusion_matrix([3], [0], 3), ValueError, "predicted"), (lambda: confusion_matrix([0], [3], 3), ValueError, "truth"), (lambda: confusion_matrix([0], [-1], 3), ValueError, "truth"), (lambda: confusion_matrix([0, 0], [0], 3), ValueError, "shape"),
    (lambda: semantic_scores(np.zeros((3, 4), int)), ValueError, "at least one pixel"), (lambda: semantic_scores(np.ones((3, 4), int), "drop"), ValueError, "absent"),
    (lambda: draw_panoptic(torch.zeros(3, 4, 4), listed([[0]]), {}), ValueError, "panoptic"), (lambda: draw_panoptic(torch.full((3, 1, 1), 255.0), listed([[0]]), {}), ValueError, "picture")])
def test_what_is_wrong_is_said(wrong, error, words):
    with pytest.raises(error, match=words): wrong()


def test_lists_of_pictures_must_agree():
    pytest.importorskip("pycocotools")
    truth = listed([[1, 1]], (1, 0))
    with pytest.raises(ValueError, match="one list for each of 1 pictures"): mask_ap([], [truth], {0})
    with pytest.raises(ValueError, match="image 0"): mask_ap([single(0.5, 0, [[1, 1, 1]])], [truth], {0})
