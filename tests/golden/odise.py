"""ODISE's golden cases: matching and losses, inference, panoptic quality (in JSON alone), semantic scores."""
import numpy as np
import pytest
import torch

from diffusion_papers.topics.segmentation import (
    assign, bce_costs, class_costs, class_loss, confusion_matrix, dice_costs, instances, mask_losses, match, panoptic_map, query_labels, sample_points, semantic_map,
    semantic_scores, uncertain_points)

GIVEN = {"matching_losses": {"pred_logits", "pred_masks", "target_masks", "target_labels", "match_points", "rand_oversampled", "rand_rest"},
         "inference": {"mask_cls", "mask_pred"}, "panoptic_quality": {"gt", "pred"}, "semantic_iou": {"gt", "pred", "num_classes", "ignore"}}


def inputs_of(case, names): return GIVEN[case]


def matching_losses(a):
    pytest.importorskip("scipy")
    labels, masks, scores, drawn = a["target_labels"], a["target_masks"], a["pred_logits"].softmax(-1), a["pred_masks"]
    pairs = match(scores, drawn, labels, masks, a["match_points"])
    logits, targets = sample_points(drawn, a["match_points"]), sample_points(masks.float(), a["match_points"])
    costs = {"cost_class": class_costs(scores, labels), "cost_mask": bce_costs(logits, targets), "cost_dice": dice_costs(logits, targets)}
    again = assign(2 * costs["cost_class"] + 5 * costs["cost_mask"] + 5 * costs["cost_dice"])
    assert all(map(torch.equal, pairs, again))
    draws, points = (a["rand_oversampled"], a["rand_rest"]), a["match_points"].shape[1]
    losses = mask_losses(drawn[pairs.query], masks[pairs.target], *draws, points, len(labels))
    wanted = query_labels(pairs, labels, scores.shape[0], scores.shape[1] - 1)
    return costs | {"match_query": pairs.query, "match_target": pairs.target, "point_coords": uncertain_points(drawn[pairs.query], *draws, points),
                    "loss_mask": losses["bce"], "loss_dice": losses["dice"], "loss_ce": class_loss(a["pred_logits"][None], wanted[None])}


def inference(a, about):
    scores, masks, things = a["mask_cls"].softmax(-1), a["mask_pred"], about["things"]
    found = instances(scores, masks, things, about["topk"])
    return {"panoptic_seg": panoptic_map(scores, masks, things, about["object_mask_threshold"], about["overlap_threshold"]).ids, "sem_seg": semantic_map(scores, masks),
            "inst_scores": found.score, "inst_classes": found.category, "inst_masks": found.mask.byte()}


def semantic_iou(a):
    scores = semantic_scores(confusion_matrix(a["pred"], a["gt"], int(a["num_classes"]), int(a["ignore"])))
    return {"iou": scores.iou} | {name: np.float64(getattr(scores, name)) for name in ("miou", "fwiou", "macc", "pacc")}


def compute(case, arrays):
    a = {name: torch.as_tensor(values) for name, values in arrays.items() if isinstance(values, np.ndarray)}
    found = {"matching_losses": lambda: matching_losses(a), "inference": lambda: inference(a, arrays["_config"]), "panoptic_quality": dict, "semantic_iou": lambda: semantic_iou(a)}[case]()
    return {name: value if isinstance(value, (np.ndarray, np.generic)) else value.numpy() for name, value in found.items()}


def compare(case, name, computed, stored):
    tolerance = {"point_coords": 1e-6, "iou": 1e-9, "miou": 1e-9, "fwiou": 1e-9, "macc": 1e-9, "pacc": 1e-9}.get(name, 1e-5)
    if stored.dtype.kind in "iu": return np.testing.assert_array_equal(computed, stored, err_msg=name)
    np.testing.assert_allclose(computed, stored, rtol=0, atol=tolerance, err_msg=name)
