"""S4 (DPLR) as a convolution against its recurrence in float64, and against dense HiPPO through scipy."""

import numpy as np
import pytest
import torch
from scipy import signal

from mambagen.kernels.s4 import s4, s4_kernel, s4_step
from mambagen.kernels.s4.cauchy import cauchy
from mambagen.kernels.s4.dense import bilinear_step
from mambagen.kernels.s4.reference import dense_bilinear
from mambagen.models.hippo import dplr_legs, hippo_legs
from tests.kernels.helpers import assert_close, relative_error

DIFFERENTIABLE = ("x", "dt", "Lambda", "P", "B", "C", "D", "initial_state")
pytestmark = pytest.mark.usefixtures("one_thread")


def draw(seed=0, batch=2, length=37, channels=6, ssms=2, state=4, initial=True, resets=None, **options):
    """Keyword arguments for `s4`: HiPPO-LegS, somewhat moved."""
    make = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=make)

    def moved(v):
        v = torch.from_numpy(v).to(torch.complex64).expand(ssms, state)
        return v + 0.1 * torch.complex(normal(ssms, state) * 0.5, normal(ssms, state))

    Lambda, P, B, _ = dplr_legs(state)
    return {
        "x": normal(batch, length, channels),
        "dt": torch.exp(normal(ssms) - 2.5),
        "Lambda": moved(Lambda),
        "P": moved(P),
        "B": moved(B),
        "C": torch.complex(normal(ssms, state), normal(ssms, state)),
        "D": normal(channels),
        "initial_state": torch.complex(*(normal(batch, channels, state) for _ in range(2))) if initial else None,
        "resets": None if resets is None else torch.rand(batch, length, generator=make) < resets,
        **options,
    }


def run(case, backend, double=False):
    """y, the final state and every gradient, in float32 or float64."""
    arguments = dict(case)
    for name in DIFFERENTIABLE:
        if case[name] is not None:
            v = case[name]
            if double:
                v = v.to(torch.complex128 if v.is_complex() else torch.float64)
            arguments[name] = v.detach().clone().requires_grad_()
    y, final = s4(**arguments, return_final_state=True, backend=backend)
    make = torch.Generator().manual_seed(1)
    dy, d_re, d_im = (torch.randn(v.shape, generator=make).to(v.device) for v in (y, final, final))
    loss = (y * dy).sum() + (final.real * d_re).sum() + (final.imag * d_im).sum()
    leaves = {name: arguments[name] for name in DIFFERENTIABLE if arguments[name] is not None}
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    result = {"y": y, "final_state": final, **{f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}}
    return {n: (torch.view_as_real(v.resolve_conj()) if v.is_complex() else v).detach() for n, v in result.items()}


@pytest.mark.parametrize("backend", ["powers", "cauchy"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"length": 1, "batch": 1},
        {"length": 2, "ssms": 1},
        {"length": 64, "ssms": 6},
        {"reverse": True, "initial": False},
        {"resets": 0.2},
        {"resets": 0.1, "reverse": True},
    ],
    ids=str,
)
def test_convolution_equals_the_recurrence_with_all_gradients(options, backend):
    case = draw(**options)
    exact = run(case, "reference", double=True)
    assert_close(run(case, backend), exact, 1e-5)
    assert_close(run(case, backend, double=True), exact, 1e-10)


@pytest.mark.parametrize("length", [1, 2, 63, 1000])
def test_both_kernels_equal_powers_of_the_discretised_matrix(length):
    case = draw(state=16, ssms=3)
    system = [case[k].to(torch.complex128 if case[k].is_complex() else torch.float64) for k in DIFFERENTIABLE[1:6]]
    Abar, Bbar = dense_bilinear(*system[:4])
    state, exact = Bbar, []
    for _ in range(length):
        exact.append(2 * (system[4] * state[:, :16]).sum(-1).real)
        state = (Abar @ state[..., None]).squeeze(-1)
    exact = torch.stack(exact, 1)
    for backend in ("powers", "cauchy"):
        kernel = s4_kernel(*system, length, backend)
        assert kernel.dtype == torch.float64
        assert (kernel - exact).abs().max() < 1e-6 * exact.abs().max(), backend
        assert relative_error(kernel, exact) < 1e-9, backend


def test_the_kernel_is_that_of_dense_hippo():
    """C in HiPPO's own coordinates: c V over the kept half of the pairs."""
    N, dt = 6, 0.05
    A, B = hippo_legs(2 * N)
    Lambda, P, b, V = dplr_legs(N)
    c = np.random.default_rng(0).normal(size=2 * N)
    Ad, Bd, *_ = signal.cont2discrete((A, B[:, None], c[None], 0), dt, "bilinear")
    exact, state = [], Bd[:, 0]
    for _ in range(200):
        exact.append(c @ state)
        state = Ad @ state
    system = [torch.from_numpy(v)[None] for v in (Lambda, P, b, c @ V)]
    for backend in ("powers", "cauchy"):
        kernel = s4_kernel(torch.tensor([dt], dtype=torch.float64), *system, 200, backend)
        np.testing.assert_allclose(kernel[0].numpy(), exact, atol=1e-9 * np.abs(exact).max())


def test_a_step_never_makes_the_state_longer():
    A = bilinear_step(*(draw(state=16, ssms=5)[k] for k in DIFFERENTIABLE[1:6])).A
    assert torch.linalg.matrix_norm(A, 2).max() <= 1 + 1e-12


def test_long_kernels_stay_right():
    """2^16 steps of the smallest decay, by the two routes that share nothing but the step's matrix."""
    case = draw(state=8, ssms=1)
    case["Lambda"] = torch.complex(torch.full((1, 8), -1e-4), case["Lambda"].imag)
    case["P"] = 1e-2 * case["P"]
    system = [case[k] for k in DIFFERENTIABLE[1:6]]
    powers, sums = (s4_kernel(*system, 2**16, backend) for backend in ("powers", "cauchy"))
    assert powers[0, -1000:].abs().max() > 1e-3 * powers.abs().max()  # there is something left to compare
    assert relative_error(powers, sums) < 1e-7


@pytest.mark.parametrize("cut", [[1, 36], [5, 2, 30], [16, 16, 5]], ids=str)
@pytest.mark.parametrize("resets", [None, 0.1])
def test_chunks_with_a_carried_state_and_steps_equal_the_whole(cut, resets):
    case = draw(resets=resets)
    whole, final = s4(**case, return_final_state=True)
    state, ys, first = case["initial_state"], [], 0
    for n in cut:
        part = slice(first, first + n)
        inside = {k: None if case[k] is None else case[k][:, part] for k in ("x", "resets")}
        y, state = s4(**{**case, **inside, "initial_state": state}, return_final_state=True)
        ys.append(y)
        first += n
    torch.testing.assert_close(torch.cat(ys, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)
    if resets is None:
        state, ys = case["initial_state"], []
        for t in range(37):
            y, state = s4_step(case["x"][:, t], state, *(case[k] for k in DIFFERENTIABLE[1:7]))
            ys.append(y)
        torch.testing.assert_close(torch.stack(ys, 1), whole, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slab", [1, 100, 2**20])
def test_cauchy_sums_are_their_definition_however_they_are_cut(slab, monkeypatch):
    monkeypatch.setattr("mambagen.kernels.s4.cauchy.SLAB", slab)
    make = torch.Generator().manual_seed(0)
    v = torch.randn(2, 3, 5, dtype=torch.complex128, generator=make)
    w = torch.randn(2, 5, dtype=torch.complex128, generator=make) - 2
    z = torch.exp(-2j * torch.pi * torch.arange(9) / 16)
    exact = (v[..., None] / ((1 - z) - (1 + z) * w[:, None, :, None])).sum(2)
    torch.testing.assert_close(cauchy(v, w, 16), exact)
    v.requires_grad_(), w.requires_grad_()
    assert torch.autograd.gradcheck(lambda v, w: cauchy(v, w, 16), (v, w), fast_mode=True)
    torch.library.opcheck(torch.ops.mambagen.s4_cauchy.default, (v, w, 16))


def test_wrong_arguments_are_named():
    for change, message in (
        ({"P": torch.zeros(2, 3)}, "P has shape"),
        ({"B": torch.zeros(3, 4)}, "B has shape"),
        ({"backend": "triton"}, "one of auto, powers"),
    ):
        with pytest.raises(ValueError, match=message):
            s4(**{**draw(), **change})
