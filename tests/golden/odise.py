"""ODISE's golden cases: the mask generator and its parts, matching and losses, names, grounding, mask tokens, inference, panoptic quality (in JSON alone), semantic scores."""
import math

import numpy as np
import pytest
import torch

from diffusion_papers.odise import class_logits, fused, grounding_loss, over_names, with_no_object
from diffusion_papers.topics.frozen_features import FeaturePyramid, ImplicitCaptioner, noised, scaled_linear, shared_noise, tiled
from diffusion_papers.topics.mask_decoder import MaskGeneratorConfig, authors_keys, build_mask_generator, deformable_attention, mask_pooling, position_sine
from diffusion_papers.topics.mask_tokens import TowerConfig, VisionTower
from diffusion_papers.topics.segmentation import (
    assign, bce_costs, class_costs, class_loss, confusion_matrix, dice_costs, instances, mask_losses, match, panoptic_map, query_labels, sample_points, semantic_map,
    semantic_scores, uncertain_points)

GIVEN = {"matching_losses": {"pred_logits", "pred_masks", "target_masks", "target_labels", "match_points", "rand_oversampled", "rand_rest"},
         "inference": {"mask_cls", "mask_pred"}, "panoptic_quality": {"gt", "pred"}, "semantic_iou": {"gt", "pred", "num_classes", "ignore"},
         "position_sine": set(), "deform_attn": {"value", "spatial_shapes", "sampling_locations", "attention_weights"}, "mask_pooling": {"x", "mask_logits"},
         "mask_generator": {"in_s2", "in_s3", "in_s4", "in_s5"},
         "schedule": {"latent", "steps"}, "captioner": {"clip_image_embed", "uncond"}, "backbone": {"image"},
         "classification": {"mask_embed", "text_embed", "null_embed", "logit_scale", "synonyms_per_class", "clip_logits_per_synonym", "seen", "alpha_beta"},
         "grounding": {"mask_embed", "word_embed", "word_valid_mask", "logit_scale"}, "maskclip": {"image", "mask_logits"}}


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


def ruled(shapes, seed):
    "Weights by the rule of the reference: sines of the place of a number, scaled by the shape."
    weights = {}
    for number, name in enumerate(sorted(shapes)):
        shape = tuple(shapes[name])
        x = np.sin(12.9898 * np.arange(math.prod(shape), dtype=np.float64) + 78.233 * number + 37.719 * seed) * 43758.5453
        u = 2 * (x - np.floor(x)) - 1
        u = u * math.sqrt(3 * shape[0] / math.prod(shape)) if len(shape) > 1 else 1 + 0.1 * u if name.endswith("weight") else 0.1 * u
        weights[name] = torch.from_numpy(u.reshape(shape)).float()
    return weights


@torch.no_grad()
def mask_generator(a, about):
    said = about["config"]
    generator = build_mask_generator(MaskGeneratorConfig(
        channels=tuple(said["feature_channels"].values()), width=said["conv_dim"], heads=said["heads"], pixel_layers=said["enc_layers"], pixel_hidden=said["enc_ffn"],
        queries=said["queries"], layers=said["dec_layers"], hidden=said["dec_ffn"], classes=said["num_classes"] + 1, norm_groups=32))
    weights, state = ruled(about["shapes"], said["seed"]), generator.state_dict()
    generator.load_state_dict({ours: weights.get(theirs.removeprefix("sem_seg_head."), state[ours]) for ours, theirs in authors_keys(generator)})
    joined, pyramid = [], [a[f"in_s{level}"] for level in (2, 3, 4, 5)]
    generator.decoder.content.norm.register_forward_pre_hook(lambda module, inputs: joined.append(inputs[0]))
    (embedding, maps), predictions = generator.pixels(pyramid), generator(pyramid)
    *earlier, last = predictions
    return {"mask_features": embedding, **{f"ms{number}": features for number, features in enumerate(maps)}, "pred_logits": last.logits, "pred_masks": last.masks, "mask_embed": last.embeddings,
            "mask_pooled_features": joined[-1], "logit_scale": generator.decoder.content.scale, "aux_pred_masks": torch.stack([p.masks for p in earlier]),
            "aux_mask_embed": torch.stack([p.embeddings for p in earlier])}


def filled(module, about):
    "A module with the weights of the rule."
    weights, state = ruled(about["shapes"], about["seed"]), module.state_dict()
    assert {theirs for _, theirs in module.authors_keys()} == weights.keys() and len(state) == len(weights)
    module.load_state_dict({ours: weights[theirs] for ours, theirs in module.authors_keys()})
    return module


def schedule(a):
    process = scaled_linear()
    kept = 1 / (1 + process.noise_to_signal(torch.arange(1000, dtype=torch.float64)) ** 2)
    before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    noise = shared_noise(4, 64, 64)
    def at(step):  # the reference noises a corner of the map with that corner of the noise
        level = process.noise_to_signal(torch.tensor(float(step), dtype=torch.float64))
        return ((1 + level**2).rsqrt() * (a["latent"] + level * noise[..., :8, :8])).float()
    whole = torch.zeros(1, 4, 64, 64)
    whole[..., :8, :8] = a["latent"]
    found = torch.cat([noised(whole, step, process)[..., :8, :8] for step in a["steps"].tolist()])
    assert torch.allclose(found, torch.cat([at(step) for step in a["steps"].tolist()]), atol=1e-6)
    return {"alphas_cumprod": kept, "betas": 1 - kept / before, "shared_noise_8x8": noise[..., :8, :8], "q_sample": found}


@torch.no_grad()
def captioner(a, about):
    module = filled(ImplicitCaptioner(a["clip_image_embed"].shape[1], *a["uncond"].shape[1:], about["shapes"]["alpha_cond_time_embed"][0]), about)
    states, terms = module(a["clip_image_embed"], a["uncond"])
    return {"cond_inputs": states, "cond_emb": terms}


@torch.no_grad()
def backbone(a, about):
    dims, strides = about["feature_dims"], about["feature_strides"]
    pyramid = filled(FeaturePyramid(tuple(dims), tuple(strides), width=about["projection_dim"]), about)
    def features(tile): return [torch.sin((torch.arange(dim) + 1.0)[:, None, None] * torch.nn.functional.avg_pool2d(tile, stride)[:, torch.arange(dim) % 3]) for dim, stride in zip(dims, strides)]
    maps = tiled(lambda tile, size: pyramid(features(tile), size), a["image"], pyramid.kept, about["crop"])
    return {f"s{number}": found for number, found in enumerate(maps, 2)}


def classification(a):
    owners = torch.repeat_interleave(torch.arange(len(a["synonyms_per_class"])), a["synonyms_per_class"])
    logits = class_logits(a["mask_embed"], a["text_embed"], owners, a["logit_scale"], a["null_embed"])
    alpha, beta = a["alpha_beta"].tolist()
    both = fused(logits[..., :-1], over_names(a["clip_logits_per_synonym"], owners), a["seen"].bool(), alpha, beta)
    return {"pred_logits": logits, "fused_logits": both, "final_log_probs": torch.log(with_no_object(both, logits.softmax(-1)[..., -1]) + 1e-8)}


@torch.no_grad()
def maskclip(a, about):
    config = TowerConfig(size=about["patch"] * about["grid"], patch=about["patch"], width=about["width"], layers=about["layers"], heads=about["heads"], hidden=about["shapes"]["transformer.resblocks.0.mlp.c_fc.bias"][0], out=about["out_dim"], stem=())
    tower, weights = VisionTower(config), ruled(about["shapes"], about["seed"])
    assert {theirs for _, theirs in tower.authors_keys()} == weights.keys() and len(tower.state_dict()) == len(weights)
    tower.load_state_dict({ours: weights[theirs].T if theirs == "proj" else weights[theirs] for ours, theirs in tower.authors_keys()})
    return {"mask_embed": tower(a["image"], a["mask_logits"])[1]}


def compute(case, arrays):
    a = {name: torch.as_tensor(values) for name, values in arrays.items() if isinstance(values, np.ndarray)}
    found = {"matching_losses": lambda: matching_losses(a), "inference": lambda: inference(a, arrays["_config"]), "panoptic_quality": dict, "semantic_iou": lambda: semantic_iou(a),
             "position_sine": lambda: {"out": position_sine(len(a["out"]), tuple(a["out"].shape[1:]))}, "mask_pooling": lambda: {"pooled": mask_pooling(a["x"], a["mask_logits"])},
             "deform_attn": lambda: {"output": deformable_attention(a["value"], a["spatial_shapes"], a["sampling_locations"], a["attention_weights"])},
             "mask_generator": lambda: mask_generator(a, arrays["_config"]), "schedule": lambda: schedule(a), "captioner": lambda: captioner(a, arrays["_config"]),
             "backbone": lambda: backbone(a, arrays["_config"]), "classification": lambda: classification(a), "maskclip": lambda: maskclip(a, arrays["_config"]),
             "grounding": lambda: {"loss": grounding_loss(a["mask_embed"], a["word_embed"], a["word_valid_mask"], a["logit_scale"])}}[case]()
    return {name: value if isinstance(value, (np.ndarray, np.generic)) else value.detach().numpy() for name, value in found.items()}


def compare(case, name, computed, stored):
    # The reference's own rounding on the coarsest map is 4e-4: that is how far float64 is from it; norms over four places magnify it.
    tolerance = {"aux_pred_masks": 2e-2} | dict.fromkeys(("mask_features", "ms0", "ms1", "ms2", "pred_logits", "pred_masks", "mask_embed", "mask_pooled_features", "aux_mask_embed", "s2", "s3", "s4"), 2e-4) | {"s5": 5e-4} | {"point_coords": 1e-6, "iou": 1e-9, "miou": 1e-9, "fwiou": 1e-9, "macc": 1e-9, "pacc": 1e-9}
    if case == "classification":  # logarithms near the floor of 1e-8 differ more than the probabilities
        if name == "final_log_probs": return np.testing.assert_allclose(np.exp(computed), np.exp(stored), rtol=0, atol=1e-6, err_msg=name)
        tolerance |= {"pred_logits": 3e-5, "fused_logits": 3e-5}
    tolerance = tolerance.get(name, 2e-4 if case == "maskclip" else 1e-5)
    if stored.dtype.kind in "iu": return np.testing.assert_array_equal(computed, stored, err_msg=name)
    np.testing.assert_allclose(computed, stored, rtol=0, atol=tolerance, err_msg=name)
