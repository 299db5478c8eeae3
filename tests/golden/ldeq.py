"""LDEQ's golden cases: solvers, gradients at equilibria, measures, filters, crops, heatmaps, a small network."""
import math
import warnings

import numpy as np
import torch

from diffusion_papers.topics.equilibrium import (
    Anderson, Broyden, FixedPoint, Implicit, Neumann, OneStep, Phantom, Stop, equilibrium, jacobian_penalty, solve, spectral_radius, unrolled)
from diffusion_papers.ldeq import LdeqConfig, authors_names, build, normalised, read_out
from diffusion_papers.topics.landmarks import (
    NUMBERINGS, Exponential, OneEuro, area_under_curve, crop_matrix, failure_rate, inverse, moved, nme, nmf, padded, smooth)

INPUTS = {"solvers": {"A", "b", "W", "c", "z0", "m", "lam"}, "implicit_grad": {"W", "U", "b", "x", "y"},
          "heatmaps": {"logits"}, "tiny_forward": {"image_int8", "video_int8"}, "metrics": {"gt", "pred", "video_gt", "video_pred"}, "filters": {"signal", "settings_freq_mincutoff_beta_dcutoff", "ema_alpha"}}


def inputs_of(case, names):
    if case == "geometry": return {"bbox_xyxy", "points"} | {name for name in names if name.startswith("pad") and name.endswith("_in")}
    return INPUTS[case]


def on_the_way(f, z0, solver, stop):
    "The states that f was evaluated at, and the solution."
    states = []
    solution = solve(f, z0, solver, stop, callback=lambda evaluation, state, residual: states.append(state))
    return torch.stack(states), solution


def steps_until(f, z0, solver, measure, before):
    "Steps until the mean residual is below 1e-6; `before` evaluations are none."
    return solve(f, z0, solver, Stop(500, 1e-6, measure, together=True)).evaluations - before


def other_library(f, z0, solver, counted):
    "As torchdeq does it: all go on until the last has arrived; Broyden answers with the state, and does not count its first evaluation."
    needed = solve(f, z0, solver, Stop(40, 1e-9)).evaluations
    answer = "z" if isinstance(solver, Broyden) else "f(z)"
    return solve(f, z0, solver, Stop(needed, 0, answer=answer)).z, torch.full((len(z0),), needed - counted, dtype=torch.float64)


def solver_case(arrays):
    given = {name: torch.as_tensor(arrays[name]) for name in INPUTS["solvers"]}
    maps = {"lin": lambda z: z @ given["A"].T + given["b"], "tanh": lambda z: torch.tanh(z @ given["W"].T + given["c"])}
    memory, ridge, z0, found = int(arrays["m"]), float(arrays["lam"]), given["z0"], {}
    for name, f in maps.items():
        longest = solve(f, z0, Anderson(8, 1e-12), Stop(500, 0)).z
        steps = len(arrays[f"{name}_fpi_traj"])
        states, last = on_the_way(f, z0, FixedPoint(), Stop(steps, 0))
        absolute = solve(f, z0, FixedPoint(), Stop(steps, 0, "absolute"))
        found |= {f"{name}_zstar": longest, f"{name}_fpi_traj": torch.cat([states[1:], last.z[None]]), f"{name}_fpi_stability": absolute.stable,
                  f"{name}_fpi_final_abs_rel": torch.stack([absolute.history[-1].mean(), last.history[-1].mean()])}
        for prefix in {key.removesuffix("_traj") for key in arrays if key.startswith(f"{name}_anderson") and key.endswith("_traj")}:
            solver = Anderson(memory, ridge, relative=False, mixing=float(prefix.split("beta")[1]))
            budget = len(arrays[f"{prefix}_traj"]) + 2
            states, solution = on_the_way(f, z0, solver, Stop(budget, 0, "shifted", together=True, answer="z"))
            absolute = solve(f, z0, solver, Stop(budget, 0, "absolute", together=True))
            found |= {f"{prefix}_traj": states[2:], f"{prefix}_result": solution.z, f"{prefix}_rel_trace": solution.history[2:].mean(1),
                      f"{prefix}_abs_trace": absolute.history[2:].mean(1)}
        budget = len(arrays[f"{name}_broyden_traj"]) + 1
        states, solution = on_the_way(f, z0, Broyden(budget), Stop(budget, 0, "absolute", together=True, answer="z"))
        found |= {f"{name}_broyden_traj": states[1:], f"{name}_broyden_result": solution.z, f"{name}_broyden_abs_trace": solution.history[1:].mean(1)}
        published = Anderson(memory, ridge, relative=False)
        found[f"{name}_steps_to_1e-6_fpi_anderson_broyden"] = [steps_until(f, z0, FixedPoint(), "relative", 0),
            steps_until(f, z0, published, "shifted", 2), steps_until(f, z0, Broyden(500), "relative", 1)]
        for other, solver, counted in (("fixed_point_iter", FixedPoint(), 0), ("anderson", published, 0), ("broyden", Broyden(40), 1)):
            found[f"{name}_torchdeq_{other}"], found[f"{name}_torchdeq_{other}_nstep"] = other_library(f, z0, solver, counted)
    return found


def gradient_case(arrays):
    W, U, b, x = (torch.as_tensor(arrays[name]).clone().requires_grad_() for name in ("W", "U", "b", "x"))
    y, origin = torch.as_tensor(arrays["y"]), torch.zeros_like(torch.as_tensor(arrays["y"]))
    added = torch.zeros_like(y).requires_grad_()  # its gradient is what arrives at f's answer
    f = lambda z: torch.tanh(z @ W.T + x @ U.T + b) + added
    loss = lambda z: (z - y).square().sum()
    def gradients(z, to=(W, U, b, x)): return torch.autograd.grad(loss(z), to)
    def at_equilibrium(gradient): return equilibrium(f, origin, FixedPoint(), Stop(1500, 0), gradient)[0]
    exact = Implicit(Anderson(), Stop(200, 1e-14))
    ways = {"unrolled1500": lambda: unrolled(f, origin, 1500), "jfb": lambda: at_equilibrium(OneStep()), "implicit": lambda: at_equilibrium(exact)}
    for key in arrays:
        if key.startswith("neumann") and key.endswith("_dW"): ways[key[:-3]] = lambda terms=int(key[7:-3]): at_equilibrium(Neumann(terms))
        if key.startswith("phantom") and key.endswith("_dW"):
            steps, damping = key[:-3].removeprefix("phantom_k").split("_tau")
            ways[key[:-3]] = lambda steps=int(steps), damping=float(damping): at_equilibrium(Phantom(steps, damping))
    found = {f"{name}_{of}": value for name, way in ways.items() for of, value in zip(("dW", "dU", "db", "dx"), gradients(way()))}
    z = solve(f, origin, FixedPoint(), Stop(1500, 0)).z
    adjoint = gradients(at_equilibrium(exact), (added,))[0]
    errors = [(gradients(at_equilibrium(Neumann(terms)), (added,))[0] - adjoint).norm() / adjoint.norm() for terms in range(1, 31)]
    with torch.no_grad(): rows = torch.stack([torch.autograd.functional.jacobian(lambda part: torch.tanh(part @ W.T + x[i] @ U.T + b), z[i]) for i in range(len(z))])
    return found | {"zstar": z, "loss": loss(z), "dL_dz": 2 * (z - y), "jacobian": rows, "adjoint": adjoint, "neumann_adjoint_rel_error_1to30": torch.stack(errors),
                    "jac_frob2_over_Bn": rows.square().sum() / z.numel(), "jac_spectral_radius": spectral_radius(f, z)}


def metric_case(arrays):
    gt, pred, video_gt, video_pred = (torch.as_tensor(arrays[name]) for name in ("gt", "pred", "video_gt", "video_pred"))
    errors = nme(pred, gt)
    return {"nme_per_image": errors / 100, "nme": errors.mean()[None] / 100, "fr10": failure_rate(errors), "auc10": area_under_curve(errors),
            "video_nme": nme(video_pred, video_gt).mean(), "video_nmf": nmf(video_pred, video_gt), "video_nmf_constant_offset": nmf(video_gt + 7, video_gt)}


def filter_case(arrays):
    signal = torch.as_tensor(arrays["signal"])
    found = {f"out{row}": smooth(signal, OneEuro(*map(float, settings))) for row, settings in enumerate(arrays["settings_freq_mincutoff_beta_dcutoff"])}
    return found | {"ema": smooth(signal, Exponential(float(arrays["ema_alpha"])))}


def through_single_precision(matrix, side=256):
    "The affine map that the reference has: it is solved from three corners that are kept in float32."
    corners = torch.tensor([[side / 2, side / 2], [side / 2, 0.0]], dtype=torch.float64)
    source = moved(corners.expand(len(matrix), -1, -1), inverse(matrix)).numpy().astype(np.float32)
    step = source[:, 0] - source[:, 1]
    source = np.concatenate([source, source[:, 1:] + np.stack([-step[:, 1], step[:, 0]], -1)[:, None]], 1)
    known = np.concatenate([source.astype(np.float64), np.ones((len(source), 3, 1))], -1)
    target = np.array([[side / 2, side / 2], [side / 2, 0], [0, 0]])
    return torch.from_numpy(np.linalg.solve(known, np.broadcast_to(target, (len(source), 3, 2)))).mT


def geometry_case(arrays):
    points, matrix = torch.as_tensor(arrays["points"]), crop_matrix(torch.as_tensor(arrays["bbox_xyxy"]), 256)
    rounded = through_single_precision(matrix)
    in_crop = moved(points, rounded)
    found = {"matrix_256": rounded, "points_in_crop": in_crop, "points_back": moved(in_crop, inverse(rounded)), "wflw_flip": NUMBERINGS["wflw98"].mirror}
    return found | {name.replace("_in", "_out"): padded(None, torch.as_tensor(arrays[name]))[1] for name in inputs_of("geometry", arrays) if name.startswith("pad")}


def heatmap_case(arrays):
    logits, found = torch.as_tensor(arrays["logits"]), {}
    for name in arrays:
        if not name.startswith("map_"): continue
        kind = name.removeprefix("map_")
        maps = normalised(logits, "linear") if kind == "linear" else normalised(logits, sharpness=float(kind.removeprefix("beta")))
        points, spread = read_out(maps, released=True)
        found |= {name: maps, f"kp_{kind}": points, f"std_{kind}": spread}
    return found


def filled(model, about):
    "The reference network: every tensor by its place among the sorted names of the released program."
    theirs = {name: ours for ours, name in authors_names(model)}
    state = model.state_dict()
    for number, name in enumerate(sorted(theirs)):
        like = state[theirs[name]]
        if name.endswith("num_batches_tracked"): continue
        wave = torch.sin(1 + 0.7 * number + 1.3 * torch.arange(like.numel(), dtype=torch.float64)).reshape(like.shape)
        if name.endswith("running_var"): value = 1 + 0.2 * wave
        elif name.endswith("running_mean"): value = 0.1 * wave
        elif "norm.weight" in name: value = 1 + 0.1 * wave
        elif name.endswith("bias"): value = 0.1 * wave
        else: value = wave * math.sqrt(2 / math.prod(like.shape[1:]))
        if name == "deq_layer.cell.head.conv.weight": value = value * about["headgain"]
        if name == "deq_layer.cell.tail.conv.weight": value[:, :about["n_keypoints"]] *= about["z_input_gain"]
        state[theirs[name]] = value
    model.load_state_dict(state)
    return model


@torch.no_grad()
def network_case(arrays):
    about = arrays["_config"]
    depth = sum("upchan" in name and name.endswith("conv.weight") for name in about["state_dict"])
    model = filled(build(LdeqConfig(size=about["im_size"], landmarks=about["n_keypoints"], features=about["injection_width"], width=about["cell_base_width"],
                                    increment=about["cell_width_increment"], groups=about["cell_gn_groups"], depth=depth)).double(), about)
    images = torch.as_tensor(arrays["image_int8"]).double() / 32
    features = model.stem(images)
    f, origin, steps, found = model.step(features), model.origin(features), about["max_iters"], {"injection": features}
    found["cell_once"] = f(origin)
    mixed = Anderson(about["anderson_m"], about["anderson_lam"], relative=False)
    for name, solver, stop in (("fpi", FixedPoint(), Stop(steps, 0)), ("anderson", mixed, Stop(steps + 2, 0, "shifted", together=True, answer="z")),
                               ("broyden", Broyden(steps + 1), Stop(steps + 1, 0, "absolute", together=True, answer="z"))):
        z = f(solve(f, origin, solver, stop).z)
        points, spread = read_out(z, released=True)
        found |= {f"{name}_keypoints": points, f"{name}_uncertainty": spread, f"{name}_zstar": z}
    video = torch.as_tensor(arrays["video_int8"]).double() / 32  # (F, B, 3, S, S)
    maps, frames = origin, []
    for frame in video:  # one step and the extra one, also for the first frame
        maps = solve(model.step(model.stem(frame)), maps, FixedPoint(), Stop(2, 0)).z
        frames.append(read_out(maps)[0])
    return found | {"rwr_keypoints": torch.stack(frames), "rwr_last_zstar": maps}


CASES = {"solvers": solver_case, "implicit_grad": gradient_case, "metrics": metric_case, "filters": filter_case, "geometry": geometry_case, "heatmaps": heatmap_case, "tiny_forward": network_case}


def compute(case, arrays):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some cases are cut short on purpose
        return {name: np.asarray(value.detach() if isinstance(value, torch.Tensor) else value) for name, value in CASES[case](arrays).items()}


def compare(case, name, computed, stored):
    loose = {"filters": 1e-10, "heatmaps": 1e-10, "metrics": 1e-6}.get(case, 1e-9)
    if case == "tiny_forward" and (name in ("injection", "cell_once") or name.endswith("zstar")): loose = 1e-5
    elif case == "tiny_forward" and name.startswith(("anderson", "broyden")): loose = 1e-6
    if case == "solvers" and "anderson" in name: loose = 1e-7
    if name.startswith("unrolled"): loose = 1e-8
    if name.startswith("matrix"): loose = 1e-6
    np.testing.assert_allclose(computed, stored, rtol=1e-6 if "error_1to30" in name else 0, atol=1e-15 if "error_1to30" in name else loose)
