"""The equations of a flow, term by term: derivatives by hand, decays in closed form, orders in time, what is kept of a product."""
import math

import pytest
import torch

from diffusion_papers.topics.fluids import FourthOrder, NavierStokes, ReleasedEuler, ReleasedHeun, Torus, energy, enstrophy, solve, speed

LENGTHS, N = (2 * math.pi, math.pi), (24, 20)  # a wave k along the second axis is sin(2 k y)
FLOWS = [NavierStokes, FourthOrder, ReleasedHeun, ReleasedEuler]
X, Y = torch.meshgrid(*(length * torch.arange(n, dtype=torch.float64) / n for length, n in zip(LENGTHS, N)), indexing="ij")
A, B = 0.7 * torch.sin(2 * X + 2 * Y), 1.3 * torch.cos(X) * torch.sin(4 * Y)  # Laplace gives -8 and -17 times
A_X, A_Y = (1.4 * torch.cos(2 * X + 2 * Y),) * 2
B_X, B_Y = -1.3 * torch.sin(X) * torch.sin(4 * Y), 5.2 * torch.cos(X) * torch.cos(4 * Y)
W = (8 * A + 17 * B)[None]  # the vorticity of the stream function A + B
U, V = A_Y + B_Y, -A_X - B_X
CARRIED = -(U * (8 * A_X + 17 * B_X) + V * (8 * A_Y + 17 * B_Y))


def build(kind, viscosity=0.0, shape=N): return kind(shape, viscosity, lengths=LENGTHS)


def test_slopes_and_laplace_are_derivatives_on_a_torus_with_two_sides():
    torus = Torus(N, lengths=LENGTHS)
    spectrum = torus.spectrum(A)
    for slope, known in zip(torus.slopes, (A_X, A_Y)):
        torch.testing.assert_close(torus.values(1j * slope * spectrum), known, atol=1e-12, rtol=0)
    torch.testing.assert_close(torus.values(torus.laplace * torus.spectrum(B)), 17 * B, atol=1e-11, rtol=0)
    assert torus.cell == pytest.approx(min(2 * math.pi / 24, math.pi / 20))


def test_a_wave_of_the_grids_edge_has_a_length_but_no_slope():
    torus = Torus((8, 8))
    assert torus.laplace[4, 0] == 16 and torus.slopes[0][4].abs().max() == 0 and torus.slopes[1][:, 4].abs().max() == 0


def waves_kept(torus):
    n = torus.shape[0]
    return {((i + n // 2) % n - n // 2, j) for i, j in torch.nonzero(torus.kept).tolist()}


def test_each_mask_keeps_the_waves_that_it_says():
    along, across = range(-6, 6), range(7)
    assert waves_kept(Torus((12, 12))) == {(i, j) for i in along for j in across if abs(i) < 4 and j < 4} - {(0, 0)}
    assert waves_kept(ReleasedEuler((12, 12), 1.0)) == {(i, j) for i in along for j in across if abs(i) <= 4 and j <= 4} - {(0, 0)}
    seen = lambda k: 0 if abs(k) == 6 else k  # of Nyquist's
    assert waves_kept(ReleasedHeun((12, 12), 1.0)) == {(i, j) for i in along for j in across if seen(i)**2 + seen(j)**2 <= 43.2} - {(0, 0)}


@pytest.mark.parametrize("kind", FLOWS)
def test_the_velocity_is_that_of_the_stream_function(kind):
    flow = build(kind)
    for found, known in zip(flow.velocity(flow.prepared(W, "w")), (U, V)): torch.testing.assert_close(found[0], known, atol=1e-11, rtol=0)


@pytest.mark.parametrize("kind", FLOWS)
def test_what_is_carried_along_is_a_product_of_derivatives(kind):
    flow = build(kind)
    found, (u, v) = flow.advection(flow.prepared(W, "w"))
    torch.testing.assert_close(flow.values(found)[0], CARRIED, atol=1e-10, rtol=0)
    torch.testing.assert_close(torch.stack([u[0], v[0]]), torch.stack([U, V]), atol=1e-11, rtol=0)


def test_a_product_of_the_highest_waves_leaves_no_false_ones():
    "On three times as many points nothing could come back as another wave."
    start = torch.randn(1, *N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    coarse, fine = build(NavierStokes), build(NavierStokes, shape=(72, 60))
    spectrum = coarse.prepared(start - start.mean(), "w")
    wide = torch.zeros(1, 72, 31, dtype=spectrum.dtype)
    wide[:, :12, :10], wide[:, -11:, :10] = 9 * spectrum[:, :12, :10], 9 * spectrum[:, 13:, :10]
    found, expected = coarse.advection(spectrum)[0], fine.advection(wide)[0] / 9
    torch.testing.assert_close(found[:, :8, :7], expected[:, :8, :7], atol=1e-9, rtol=0)
    torch.testing.assert_close(found[:, -7:, :7], expected[:, -7:, :7], atol=1e-9, rtol=0)
    assert found[:, 8:17].abs().max() < 1e-9 and found[:, :, 7:].abs().max() < 1e-9


HALF = 0.25 * 0.3 * 8 / 2  # dt nu |k|^2 / 2 of the wave A
DECAY = {NavierStokes: (1 - HALF) / (1 + HALF), ReleasedHeun: (1 - HALF) / (1 + HALF), ReleasedEuler: (1 - HALF) / (1 + HALF),
         FourthOrder: math.exp(-2 * HALF)}
PUSHED = {NavierStokes: 0.25 / (1 + HALF), ReleasedHeun: 0.25 / (1 + HALF), ReleasedEuler: 0.25 / (1 + HALF),
          FourthOrder: 0.25 * (1 + 4 * math.exp(-HALF) + math.exp(-2 * HALF)) / 6}


@pytest.mark.parametrize("kind", FLOWS)
def test_a_single_wave_decays_and_is_pushed_by_what_the_scheme_says(kind):
    "Crank and Nicolson's ratio; of fourth order the exact decay, and Simpson's rule for the force."
    flow = build(kind, 0.3)
    found, _ = flow.step(flow.prepared(A[None], "w"), flow.prepared(0.4 * A[None], "force"), 0.25)
    torch.testing.assert_close(flow.values(found)[0], (DECAY[kind] + 0.4 * PUSHED[kind]) * A, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind, order", zip(FLOWS, (2, 4, 2, 1)))
def test_halving_a_step_gains_what_the_order_says(kind, order):
    flow = build(kind, 0.05)
    spectrum, force = (flow.prepared(0.1 * W * scale, "w") for scale in (1.0, 0.5))
    ends = []
    for steps in (2, 4, 128):
        w = spectrum
        for _ in range(steps): w = flow.step(w, force, 0.4 / steps)[0]
        ends.append(w)
    long, short = ((end - ends[-1]).abs().max() for end in ends[:2])
    assert math.log2(long / short) == pytest.approx(order, abs=0.2)


def test_all_schemes_end_at_the_same_flow():
    "Where each keeps all waves that matter."
    ends = [solve(build(kind, 0.05), 0.1 * W, 0.05 * W, time=0.1, dt=0.1 / steps) for kind, steps in zip(FLOWS, (40, 10, 40, 400))]
    for end in ends[:-1]: torch.testing.assert_close(end, ends[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(ends[-1], ends[1], atol=1e-3, rtol=0)


def test_a_steps_velocity_is_the_one_before_it():
    for kind in FLOWS:
        flow = build(kind, 0.05)
        spectrum = flow.prepared(W, "w")
        torch.testing.assert_close(flow.step(spectrum, 0 * spectrum, 1e-3)[1][0][0], U, atol=1e-11, rtol=0)


def test_the_released_masks_come_where_the_programs_have_them():
    "Neither takes waves from the start; one takes them after the step, the other from the quadratic term alone."
    rough = torch.randn(1, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rough = rough - rough.mean()
    for kind in (ReleasedHeun, ReleasedEuler):
        flow = kind((12, 12), 0.3, lengths=(2 * math.pi,) * 2)
        spectrum = flow.prepared(rough, "w")
        torch.testing.assert_close(flow.values(spectrum), rough, atol=1e-12, rtol=0)
        after, left_out = flow.step(spectrum, 0 * spectrum, 1e-2)[0], flow.kept == 0
        left_out[0, 0] = False
        half = 0.5 * 1e-2 * 0.3 * flow.laplace[left_out]
        expected = 0 * half if kind is ReleasedHeun else (1 - half) / (1 + half)
        torch.testing.assert_close(after[0][left_out], expected * spectrum[0][left_out], atol=1e-12, rtol=0)


def test_the_fastest_point_counts_along_either_axis_and_in_either_direction():
    calm = torch.tensor([[0.5, -0.2]])
    assert speed((calm, torch.tensor([[0.1, -3.0]]))) == 3.0 and speed((-2 * calm, calm)) == 1.0
    assert math.isnan(speed((calm, torch.tensor([[math.nan, 0.0]]))))


def test_energy_and_enstrophy_are_halves_of_mean_squares():
    flow = build(NavierStokes)
    torch.testing.assert_close(energy(flow, W), (U**2 + V**2).mean()[None] / 2)
    torch.testing.assert_close(enstrophy(W), (W**2).mean()[None] / 2)
    assert energy(flow, 8 * A[None]).item() == pytest.approx(0.7**2 * 8 / 4) and enstrophy(8 * A[None]).item() == pytest.approx((8 * 0.7)**2 / 4)


def test_time_is_filled_by_steps_of_which_the_last_is_shorter():
    flow, seen = build(NavierStokes), []
    note = lambda step, time, spectrum: seen.append((step, time))
    solve(flow, 0.01 * W, time=1.0, dt=0.3, callback=note)
    assert [step for step, _ in seen] == [0, 1, 2, 3] and [time for _, time in seen] == pytest.approx([0, 0.3, 0.6, 0.9])
    decayed = solve(build(FourthOrder, 0.3), A[None], time=0.7, dt=0.3)
    torch.testing.assert_close(decayed[0], math.exp(-0.3 * 8 * 0.7) * A, atol=1e-12, rtol=0)


def test_without_a_step_the_fastest_point_moves_by_a_part_of_a_cell():
    flow, seen = build(NavierStokes), []
    fastest, cell = max(U.abs().max(), V.abs().max()).item(), math.pi / 20
    solve(flow, W, time=0.01, courant=0.2, callback=lambda step, time, spectrum: seen.append(time))
    assert seen[1] == pytest.approx(0.2 * cell / fastest)
    seen.clear()  # at rest the speed counts as a cell a time
    solve(flow, 0 * W, time=1.0, callback=lambda step, time, spectrum: seen.append(time))
    assert seen == pytest.approx([0, 0.4, 0.8])


def test_a_flow_may_not_leave_its_cell_in_a_step():
    flow = build(NavierStokes)
    longest = math.pi / 20 / max(U.abs().max(), V.abs().max()).item()
    solve(flow, W, time=0.99 * longest, dt=0.99 * longest)
    with pytest.raises(FloatingPointError, match=rf"step 0 at time 0 is unstable: the Courant number is 1.25; take less than {longest:.3g}"):
        solve(flow, W, time=1.25 * longest, dt=1.25 * longest)


def test_a_mean_is_taken_away_aloud():
    flow = build(NavierStokes)
    with pytest.warns(UserWarning, match="w: a mean of up to 2 is taken away"): spectrum = flow.prepared(A[None] + 2, "w")
    torch.testing.assert_close(flow.values(spectrum)[0], A, atol=1e-12, rtol=0)
