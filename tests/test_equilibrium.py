"""Fixed points: what the solvers propose, when they stop, and the gradients, against closed forms and another library."""
import warnings

import pytest
import torch
from torch import nn

from diffusion_papers.topics.equilibrium import (
    GRADIENTS, SOLVERS, Anderson, Broyden, FixedPoint, Implicit, Neumann, OneStep, Packing, Phantom, Stop, equilibrium, jacobian_penalty,
    mixture_weights, saved_bytes, solve, spectral_radius, unrolled)
from extras import EXTRAS, importlib

WAYS = {"plain": FixedPoint(), "damped": FixedPoint(0.5), "anderson": Anderson(), "anderson, mixed": Anderson(mixing=0.7), "broyden": Broyden(), "broyden, short": Broyden(3)}


def contraction(size=7, batch=4, radius=0.8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(size, size, dtype=torch.float64, generator=generator)
    W = radius * W / torch.linalg.matrix_norm(W, 2)
    b = torch.randn(batch, size, dtype=torch.float64, generator=generator)
    return W, b, lambda z: z @ W.T + b


def truth(W, b): return torch.linalg.solve(torch.eye(len(W), dtype=W.dtype) - W, b.T).T


@pytest.mark.parametrize("way", WAYS)
def test_every_solver_finds_the_fixed_point_of_an_affine_map(way):
    W, b, f = contraction()
    found = solve(f, torch.zeros_like(b), WAYS[way], Stop(300, 1e-9))
    assert found.converged.all() and torch.allclose(found.z, truth(W, b), atol=1e-7)
    assert found.evaluations == len(found.history) == found.arrived.max() and (found.residual <= 1e-9).all()


@pytest.mark.parametrize("way", WAYS)
def test_a_member_gets_in_a_batch_what_it_gets_alone(way):
    W, b, f = contraction()
    start = torch.cat([truth(W, b)[:1], 100 * torch.ones_like(b[1:2]), torch.zeros_like(b[2:])])  # one is there already, one is far away
    together = solve(f, start, WAYS[way], Stop(300, 1e-6))
    for member in range(len(b)):
        alone = solve(lambda z: z @ W.T + b[member:member + 1], start[member:member + 1], WAYS[way], Stop(300, 1e-6))
        assert torch.allclose(alone.z[0], together.z[member], rtol=1e-9, atol=1e-9) and alone.arrived[0] == together.arrived[member]
        waiting = together.history[together.arrived[member] - 1:, member]
        assert torch.equal(waiting, waiting[:1].expand_as(waiting))  # whoever has arrived stays


def test_by_the_mean_all_stop_at_once():
    W, b, f = contraction()
    start = torch.cat([truth(W, b)[:3], torch.zeros_like(b[3:])])
    each, mean = (solve(f, start, FixedPoint(), Stop(300, 1e-3, "absolute", together=together)) for together in (False, True))
    assert mean.history[-1].mean() <= 1e-3 < mean.history[-2].mean() and mean.evaluations < each.evaluations
    assert (mean.arrived == mean.evaluations).all() and len(set(each.arrived.tolist())) > 1


def test_residuals_are_what_they_are_called():
    f, z = lambda z: 0.5 * z + 1, torch.tensor([[4.0, 0.0], [0.0, 8.0]], dtype=torch.float64)  # f(z) = (3, 1), (1, 5)
    for measure, expected in (("absolute", [2**0.5, 10**0.5]), ("relative", [(2 / 10)**0.5, (10 / 26)**0.5])):
        found = solve(f, z, FixedPoint(), Stop(1, 0, measure))
        assert found.history[0].tolist() == pytest.approx(expected, rel=1e-4)


def test_the_first_proposals_are_what_the_methods_say():
    W, b, f = contraction()
    states = {}
    for way, solver in WAYS.items(): solve(f, torch.ones_like(b), solver, Stop(3, 0), callback=lambda k, z, r: states.setdefault(way, []).append(z))
    z = torch.ones_like(b)
    for way in ("plain", "anderson", "anderson, mixed", "broyden"): assert torch.allclose(states[way][1], f(z))
    assert torch.allclose(states["damped"][1], (z + f(z)) / 2)
    assert torch.allclose(solve(lambda z: z + 1, z, FixedPoint(0.25), Stop(3, 0, answer="z")).z, z + 0.5)
    g = [f(x) - x for x in (z, f(z))]
    share = -((g[0] * (g[1] - g[0])).sum(1) / (g[1] - g[0]).square().sum(1))[:, None]  # the best mixture of two residuals, in closed form
    mixed = (1 - share) * f(z) + share * f(f(z))
    assert torch.allclose(states["anderson"][2], mixed, atol=1e-6)
    assert torch.allclose(states["anderson, mixed"][2], 0.7 * mixed + 0.3 * ((1 - share) * z + share * f(z)), atol=1e-6)


def test_broyden_satisfies_its_secant_equation():
    W, b, f = contraction()
    propose, x = Broyden().begin(10), torch.zeros_like(b)
    pairs = []
    for _ in range(6):
        pairs.append((x, f(x) - x))
        x = propose(x, f(x))
    (before, g_before), (after, g_after) = pairs[-2:]
    assert torch.allclose(propose._times(g_after - g_before), after - before, atol=1e-9)
    u = torch.randn_like(b)
    assert torch.allclose((propose._times(u) * b).sum(1), (u * propose._transposed(b)).sum(1))


def test_mixtures_add_up_to_one_and_are_never_singular():
    G = torch.randn(3, 4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = G @ G.mT
    for scale in (1e-12, 1.0, 1e12):
        weights = mixture_weights(scale * gram, 1e-8)
        assert torch.allclose(weights.sum(1), torch.ones(3, dtype=torch.float64)) and torch.allclose(weights, mixture_weights(gram, 1e-8))
    size = (weights[:, None] @ gram @ weights[..., None])[:, 0, 0]
    for other in (torch.eye(4, dtype=torch.float64), torch.full((1, 4), 0.25, dtype=torch.float64)):
        assert (size[:, None] <= torch.einsum("ni,bij,nj->bn", other, gram, other) + 1e-9).all()
    for singular in (torch.zeros(2, 3, 3), torch.ones(2, 3, 3), torch.full((2, 3, 3), 1e-300)):
        assert torch.allclose(mixture_weights(singular.double(), 1e-8).sum(1), torch.ones(2, dtype=torch.float64))
    with_ridge = torch.linalg.solve(gram + 0.5 * torch.eye(4), torch.ones(3, 4, 1, dtype=torch.float64))[..., 0]
    assert torch.allclose(mixture_weights(gram, 0.5, relative=False), with_ridge / with_ridge.sum(1, keepdim=True))


def test_a_budget_is_spent_and_a_missed_tolerance_is_told():
    W, b, f = contraction(radius=0.99)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = solve(f, torch.zeros_like(b), FixedPoint(), Stop(5, 0))
    assert found.evaluations == 5 and torch.allclose(found.z, f(f(f(f(f(torch.zeros_like(b)))))))
    with pytest.warns(UserWarning, match="4 of 4 members did not come to the tolerance 1e-09 within 5 evaluations"):
        found = solve(f, torch.zeros_like(b), FixedPoint(), Stop(5, 1e-9))
    assert not found.converged.any() and (found.arrived == 5).all()


def test_the_best_state_is_the_answer_and_a_lost_method_stops():
    values = iter([5.0, 1.0, 3.0, 4000.0, 1.0])
    path = []
    class Next:
        selects, memory = True, 0
        def begin(self, evaluations): return self
        def __call__(self, x, fx): return torch.full_like(x, next(values))
    with pytest.warns(UserWarning): found = solve(lambda z: 0.0 * z, torch.full((1, 1), 9.0), Next(), Stop(9, 1e-9, "absolute", answer="z"), callback=lambda k, z, r: path.append(z.item()))
    assert path == [9, 5, 1, 3, 4000] and found.z.item() == 1 and found.residual.item() == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_told_and_never_returned(bad):
    def f(z): return torch.where(z > 2, torch.tensor(bad), z + 1)
    with pytest.raises(FloatingPointError, match=r"f\(z\): NaN or infinite for 1 of 2 members at evaluation 4; the largest residual"):
        solve(f, torch.tensor([[0.0], [-50.0]]), FixedPoint(), Stop(9, 0))


def test_states_of_several_tensors_are_one_state():
    W, b, f = contraction()
    def fixed(state): return {"a": (f(state["a"][0]), state["b"] / 2), "b": state["a"][1] / 2 + 1}
    start = {"a": (torch.zeros_like(b), torch.zeros(4, 2, 3, dtype=torch.float64)), "b": torch.zeros(4, 2, 3, dtype=torch.float64)}
    found = solve(fixed, start, Anderson(), Stop(200, 1e-9)).z
    assert torch.allclose(found["a"][0], truth(W, b)) and torch.allclose(found["b"], torch.full((4, 2, 3), 4 / 3, dtype=torch.float64))
    half = solve(lambda z: (0.5 * z.float() + 1).bfloat16(), torch.zeros(2, 3, dtype=torch.bfloat16), Anderson(), Stop(20, 1e-2))
    assert half.z.dtype == torch.bfloat16 and torch.allclose(half.z.float(), torch.full((2, 3), 2.0), atol=0.02)
    assert Packing(torch.zeros(2, dtype=torch.float64)).pack(torch.ones(2, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("call, error, message", [
    (lambda: solve(lambda z: z[:, :2], torch.zeros(2, 3)), ValueError, r"f\(z\): expected shapes \[\(2, 3\)\]"),
    (lambda: solve(lambda z: z, "state"), TypeError, "state: expected tensors"),
    (lambda: solve(lambda z: z, torch.zeros(2, 3, dtype=torch.long)), TypeError, "z0: expected floating-point"),
    (lambda: solve(lambda z: z, (torch.zeros(2), torch.zeros(3))), ValueError, "z0: expected tensors with the same first axis"),
    (lambda: solve(lambda z: z, torch.zeros(0, 3)), ValueError, "z0: expected at least one member"),
    (lambda: solve(lambda z: z, []), ValueError, "z0: expected at least one tensor"),
    (lambda: Stop(0), ValueError, "evaluations: expected at least 1"), (lambda: Stop(tolerance=-1), ValueError, "tolerance: expected at least 0"),
    (lambda: Stop(tolerance=float("nan")), ValueError, "tolerance"), (lambda: Stop(measure="size"), ValueError, "measure: expected one of absolute, relative, shifted"),
    (lambda: Stop(answer="x"), ValueError, "answer: expected one of"), (lambda: Anderson(0), ValueError, "memory"), (lambda: Anderson(ridge=0), ValueError, "ridge"),
    (lambda: Anderson(mixing=0), ValueError, "mixing"), (lambda: Broyden(0), ValueError, "memory"), (lambda: FixedPoint(0), ValueError, "damping"),
    (lambda: FixedPoint(1.5), ValueError, "damping"), (lambda: FixedPoint(memory=3), TypeError, "memory"), (lambda: Neumann(0), ValueError, "terms"),
    (lambda: Phantom(0), ValueError, "steps"), (lambda: unrolled(lambda z: z, torch.zeros(1, 1), 0), ValueError, "steps"),
    (lambda: equilibrium(lambda z: torch.zeros(2, 2), torch.zeros(2, 2), FixedPoint(), Stop(1, 0)), RuntimeError, "autograd does not follow f"),
])
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message): call()


# ---- gradients

def leaves(seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape, scale=1.0: (scale * torch.randn(*shape, dtype=torch.float64, generator=generator)).requires_grad_()
    return draw(6, 6, scale=0.25), draw(6, 4), draw(3, 4)


def gradients(way, W, U, x):
    origin = torch.zeros(3, 6, dtype=torch.float64)
    f = lambda z: torch.tanh(z @ W.T + x @ U.T)
    z = unrolled(f, origin, way) if isinstance(way, int) else equilibrium(f, origin, Anderson(), Stop(300, 1e-14), way)[0]
    return torch.cat([part.flatten() for part in torch.autograd.grad((z - 0.3).square().sum(), (W, U, x))])


def test_the_implicit_gradient_is_that_of_a_long_unroll():
    parts = leaves()
    exact, size = gradients(500, *parts), gradients(500, *parts).norm()
    for solver in SOLVERS.values():
        assert (gradients(Implicit(solver(), Stop(300, 1e-13)), *parts) - exact).norm() < 1e-9 * size
    errors = [(gradients(Neumann(terms), *parts) - exact).norm() / size for terms in (1, 2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3
    same = gradients(OneStep(), *parts)
    assert torch.equal(same, gradients(Neumann(1), *parts)) and torch.allclose(same, gradients(Phantom(1, 1.0), *parts))


def test_gradients_pass_finite_differences():
    def f(W, U, x):
        return equilibrium(lambda z: torch.tanh(z @ W.T + x @ U.T), torch.zeros(3, 6, dtype=torch.float64), Broyden(), Stop(200, 1e-13),
                           Implicit(FixedPoint(), Stop(300, 1e-13)))[0]
    assert torch.autograd.gradcheck(f, leaves(1))


def test_the_numbers_do_not_depend_on_whether_a_gradient_is_asked_for():
    W, U, x = leaves()
    f = lambda z: torch.tanh(z @ W.T + x @ U.T)
    start, stop = torch.zeros(3, 6, dtype=torch.float64), Stop(4, 0)
    with torch.no_grad(): without = equilibrium(f, start, FixedPoint(), stop)[0]
    for gradient in (OneStep(), Neumann(3), Implicit()): assert torch.equal(equilibrium(f, start, FixedPoint(), stop, gradient)[0], without)
    assert torch.equal(without, unrolled(f, start, 5)) and not without.requires_grad


def test_layers_learn_through_an_equilibrium():
    torch.manual_seed(0)
    layer, data = nn.Linear(8, 8), torch.randn(16, 8)
    with torch.no_grad(): layer.weight.mul_(0.3)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        z, _ = equilibrium(lambda z: torch.tanh(layer(z) + data), torch.zeros_like(data), Anderson(), Stop(20, 0))
        loss = (z.mean(1) - data[:, 0].tanh()).square().mean()
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_what_is_saved_does_not_grow_with_the_way():
    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh()), torch.randn(8, 32)
    f = lambda z: layer(z + x)
    def saved(steps, gradient=None):
        if gradient is None: return saved_bytes(lambda: unrolled(f, torch.zeros_like(x), steps))
        return saved_bytes(lambda: equilibrium(f, torch.zeros_like(x), FixedPoint(), Stop(steps, 0), gradient)[0])
    for gradient in (OneStep(), Implicit()): assert saved(16, gradient) <= 1.05 * saved(1, gradient)
    counts = [saved(steps) for steps in (1, 2, 4, 8, 16)]
    assert counts[-1] >= 4 * counts[0]
    slopes = [(b - a) / n for a, b, n in zip(counts[1:], counts[2:], (2, 4, 8))]
    assert max(slopes) == pytest.approx(min(slopes), rel=1e-3)  # linear once the weights are counted
    assert saved_bytes(lambda: (lambda w: (w * w).sum())(torch.ones(100, requires_grad=True))) == 400


def test_own_memory_is_told():
    W, b, f = contraction(size=50)
    row = b.nbytes
    for solver, rows in ((FixedPoint(), 0), (Anderson(memory=4), 8), (Broyden(memory=30), 2 + 2 * 10)):
        memory = solve(f, torch.zeros_like(b), solver, Stop(10, 0)).memory
        assert rows * row <= memory <= rows * row + 4 * 4 * 4 * 8


# ---- how a map stretches

def test_the_spectral_radius_is_that_of_the_jacobian():
    W, b, f = contraction(size=9)
    exact = torch.linalg.eigvals(W).abs().max().item()
    assert spectral_radius(f, b).tolist() == pytest.approx([exact] * 4, rel=1e-8)
    wide = torch.diag(torch.linspace(-0.2, 0.2, 400, dtype=torch.float64))
    wide[:2, :2] = torch.tensor([[0.3, -0.6], [0.6, 0.3]])
    found = spectral_radius(lambda z: z @ wide.T, torch.randn(2, 400, dtype=torch.float64), generator=torch.Generator().manual_seed(0))
    assert found.tolist() == pytest.approx([0.45**0.5] * 2, rel=1e-3)
    assert spectral_radius(lambda z: 0 * z, b).max() == 0


def test_the_penalty_is_the_mean_square_of_the_jacobian():
    W, b, f = contraction(size=9)
    found = jacobian_penalty(f, b, torch.Generator().manual_seed(0), probes=2000)
    assert found.item() == pytest.approx(W.square().sum().item() / 9, rel=0.05)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    penalty = jacobian_penalty(lambda z: scale * z, b, torch.Generator().manual_seed(0), probes=500)
    assert penalty.item() == pytest.approx(0.49, rel=0.1)
    assert torch.autograd.grad(penalty, scale)[0].item() == pytest.approx(2 * penalty.item() / 0.7, rel=1e-6)


# ---- beside another library

oracle = pytest.mark.skipif(importlib.util.find_spec("torchdeq") is None, reason="needs torchdeq: pip install 'diffusion_papers[dev]'")


@oracle
@pytest.mark.parametrize("name", SOLVERS)
def test_torchdeq_finds_the_same_and_has_the_same_gradient(name):
    import torchdeq
    W, U, x = leaves()
    f = lambda z: torch.tanh(z @ W.T + x @ U.T)
    other = {"fixed_point": "fixed_point_iter"}.get(name, name)
    deq = torchdeq.get_deq(core="sliced", ift=True, f_solver=other, b_solver=other, f_tol=1e-10, b_tol=1e-10, f_max_iter=200, b_max_iter=200,
                           f_stop_mode="rel", b_stop_mode="rel")
    start = torch.zeros(3, 6, dtype=torch.float64)
    theirs = deq(f, start)[0][-1]
    ours, solution = equilibrium(f, start, SOLVERS[name](), Stop(200, 1e-10), Implicit(SOLVERS[name](), Stop(200, 1e-10)))
    assert torch.allclose(ours, theirs, atol=1e-6)
    slope = lambda z: torch.cat([part.flatten() for part in torch.autograd.grad((z - 0.3).square().sum(), (W, U, x))])
    assert torch.allclose(slope(ours), slope(theirs), atol=1e-5)


@oracle
def test_torchdeq_has_the_same_penalty():
    from torchdeq.loss import jac_reg
    W, b, f = contraction()
    z = b.clone().requires_grad_()
    torch.manual_seed(3)
    theirs, ours = jac_reg(f(z), z, vecs=1000), jacobian_penalty(f, b, probes=1000)
    assert ours.item() == pytest.approx(theirs.item(), rel=0.05)
