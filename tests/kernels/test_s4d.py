"""S4D as a convolution against its recurrence in float64, and against closed forms and scipy."""

import numpy as np
import pytest
import torch
from scipy import signal

from mambagen.kernels.fft_conv import fast_length, long_conv, slabs
from mambagen.kernels.s4d import discretise, s4d, s4d_kernel, s4d_step
from mambagen.kernels.s4d.toeplitz import pays, toeplitz_conv
from mambagen.kernels.s4d.vandermonde import vandermonde_product
from tests.kernels.helpers import assert_close, relative_error

DIFFERENTIABLE = ("x", "dt", "A", "C", "D", "initial_state")
pytestmark = pytest.mark.usefixtures("one_thread")


def draw(
    seed=0, batch=2, length=37, channels=6, ssms=2, state=5, skip=True, initial=True, resets=None, real=False, **options
):
    """Keyword arguments for `s4d`, as a layer would see them."""
    make = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=make)

    A = torch.complex(-0.5 - 0.3 * normal(ssms, state).abs(), 3.0 * torch.arange(state).expand(ssms, state))
    return {
        "x": normal(batch, length, channels),
        "dt": torch.exp(normal(ssms) - 3),
        "A": A.real if real else A,
        "C": normal(ssms, state) if real else torch.complex(normal(ssms, state), normal(ssms, state)),
        "D": normal(channels) if skip else None,
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
    y, final = s4d(**arguments, return_final_state=True, backend=backend)
    make = torch.Generator().manual_seed(1)
    dy, d_re, d_im = (torch.randn(v.shape, generator=make).to(v.device) for v in (y, final, final))
    loss = (y * dy).sum() + (final.real * d_re).sum() + (final.imag * d_im).sum()
    leaves = {name: arguments[name] for name in DIFFERENTIABLE if arguments[name] is not None}
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    result = {"y": y, "final_state": final, **{f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}}
    return {n: (torch.view_as_real(v) if v.is_complex() else v).detach() for n, v in result.items()}


CASES = [
    {},
    {"length": 1, "batch": 1},
    {"length": 2},
    {"length": 130, "discretisation": "bilinear"},
    {"ssms": 1},
    {"ssms": 6, "initial": False, "skip": False},
    {"real": True},
    {"reverse": True},
    {"reverse": True, "initial": False, "ssms": 1, "length": 64},
    {"resets": 0.2},
    {"resets": 0.2, "reverse": True},
    {"resets": 0.02, "initial": False, "length": 65},
    {"resets": 1.1, "ssms": 6},
    {"resets": -1.0, "reverse": True},
    {"channels": 64, "ssms": 1, "initial": False, "length": 20},
    {"channels": 70, "ssms": 2, "reverse": True},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_convolution_equals_the_recurrence_with_all_gradients(options):
    case = draw(**options)
    exact = run(case, "reference", double=True)
    assert_close(run(case, "torch"), exact, 5e-6)
    assert_close(run(case, "torch", double=True), exact, 1e-11)


@pytest.mark.parametrize("discretisation", ["zoh", "bilinear"])
def test_long_kernels_keep_their_phase(discretisation):
    """64 states of S4D-Lin at the largest steps and a decay that has almost gone: 1e5 turns at the end."""
    length, n = 20_000, torch.arange(64)
    A = torch.complex(torch.full((64,), -1e-4), torch.pi * n)[None]
    dt, C = torch.tensor([0.1]), torch.ones(1, 64, dtype=torch.complex64)
    kernel = s4d_kernel(dt, A, C, length, discretisation)
    step = dt.double().item() * A[0].numpy().astype(complex)
    if discretisation == "zoh":
        Abar, Bbar = np.exp(step), np.expm1(step) / A[0].numpy().astype(complex)
    else:
        Abar, Bbar = (1 + step / 2) / (1 - step / 2), dt.double().item() / (1 - step / 2)
    state, exact = Bbar, []
    for _ in range(length):
        exact.append(2 * state.sum().real)
        state = Abar * state
    assert relative_error(kernel[0], torch.tensor(np.array(exact))) < 5e-6


@pytest.mark.parametrize(("ours", "theirs"), [("zoh", "zoh"), ("bilinear", "bilinear")])
def test_discretisation_is_scipys(ours, theirs):
    A, dt = torch.tensor([[-0.5 + 3j, -2.0 + 0j, -1e-4 + 0j]], dtype=torch.complex128), torch.tensor([0.25]).double()
    z, b = discretise(dt, A, ours)
    Ad, Bd, *_ = signal.cont2discrete((np.diag(A[0].numpy()), np.ones((3, 1)), np.ones((1, 3)), 0), 0.25, theirs)
    np.testing.assert_allclose(torch.exp(z)[0].numpy(), np.diag(Ad), rtol=1e-12)
    np.testing.assert_allclose(b[0].numpy(), Bd[:, 0], rtol=1e-10)


def test_a_bilinear_step_that_forgets_everything_has_finite_gradients():
    dt, A = torch.tensor([1.0], requires_grad=True), torch.tensor([[-2.0]], requires_grad=True)
    kernel = s4d_kernel(dt, A, torch.ones(1, 1), 5, "bilinear")
    torch.testing.assert_close(kernel.detach(), torch.tensor([[1.0, 0, 0, 0, 0]]))
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(kernel.sum(), [dt, A]))


def test_an_integrator_and_tiny_steps_keep_their_digits():
    z, b = discretise(torch.tensor([0.5, 1e-9]), torch.tensor([[0.0], [-1.0]]), "zoh")
    torch.testing.assert_close(b[:, 0].real, torch.tensor([0.5, 1e-9]).double(), rtol=1e-8, atol=0)
    assert z[0, 0] == 0


@pytest.mark.parametrize("cut", [[37], [1, 36], [5, 2, 30]], ids=str)
@pytest.mark.parametrize("resets", [None, 0.1])
def test_chunks_with_a_carried_state_and_steps_equal_the_whole(cut, resets):
    case = draw(resets=resets)
    whole, final = s4d(**case, return_final_state=True)
    state, ys, first = case["initial_state"], [], 0
    for n in cut:
        part = slice(first, first + n)
        inside = {k: None if case[k] is None else case[k][:, part] for k in ("x", "resets")}
        y, state = s4d(**{**case, **inside, "initial_state": state}, return_final_state=True)
        ys.append(y)
        first += n
    torch.testing.assert_close(torch.cat(ys, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)
    if resets is None:
        state, ys = case["initial_state"], []
        for t in range(37):
            y, state = s4d_step(case["x"][:, t], state, *(case[k] for k in ("dt", "A", "C", "D")))
            ys.append(y)
        torch.testing.assert_close(torch.stack(ys, 1), whole, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)


def test_reverse_is_the_flipped_sequence_forward():
    case = draw()
    forward = s4d(**{**case, "x": case["x"].flip(1)}).flip(1)
    torch.testing.assert_close(s4d(**case, reverse=True), forward, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_off_by_its_rounding_only(dtype):
    case = draw(initial=False)
    x = case["x"].to(dtype)
    y = s4d(**{**case, "x": x})
    exact = s4d(**{**case, "x": x.float()})
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), exact, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("slab", [1, 40, 200, 10**6])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_long_convolution_is_numpys_however_it_is_cut(slab, reverse, monkeypatch):
    monkeypatch.setattr("mambagen.kernels.fft_conv.SLAB_CPU", slab)
    monkeypatch.setattr("mambagen.kernels.fft_conv.LEAST_ROWS", 1)
    make = torch.Generator().manual_seed(0)
    x, k = torch.randn(3, 19, 4, generator=make).double(), torch.randn(2, 19, generator=make).double()
    skip = torch.randn(4, generator=make).double()
    x.requires_grad_(), k.requires_grad_(), skip.requires_grad_()
    y = long_conv(x, k, reverse)
    torch.testing.assert_close(long_conv(x, k, reverse, skip), y + skip * x)
    for b in range(3):
        for c in range(4):
            row = x[b, :, c].detach().numpy()[:: -1 if reverse else 1]
            exact = np.convolve(row, k[c // 2].detach().numpy())[:19][:: -1 if reverse else 1]
            np.testing.assert_allclose(y[b, :, c].detach().numpy(), exact, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x, k: long_conv(x, k, reverse), (x, k), fast_mode=True)
    assert torch.autograd.gradcheck(lambda x, k, skip: long_conv(x, k, reverse, skip), (x, k, skip), fast_mode=True)


@pytest.mark.parametrize(("batch", "channels", "kernels"), [(3, 70, 70), (2, 64, 1), (5, 66, 3), (1, 200, 2)])
@pytest.mark.parametrize("slab", [1, 33 * 40, 10**6])
def test_slabs_cover_every_row_once_and_every_kernel_in_one(batch, channels, kernels, slab, monkeypatch):
    monkeypatch.setattr("mambagen.kernels.fft_conv.SLAB_CPU", slab)
    seen = torch.zeros(batch, channels)
    served = torch.zeros(kernels)
    for kernel, pieces in slabs(torch.zeros(batch, 5, channels), kernels, 33):
        served[kernel] += 1
        for rows, columns in pieces:
            seen[rows, columns] += 1
            assert seen[rows, columns].numel() <= max(4, slab // 33)
            each = channels // kernels
            assert kernel.start * each <= columns.start < columns.stop <= kernel.stop * each
    assert (seen == 1).all()
    assert (served == 1).all()


@pytest.mark.parametrize("kernels", [1, 2])
@pytest.mark.parametrize("length", [1, 33])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_toeplitz_product_is_the_long_convolution_with_all_gradients(kernels, length, reverse):
    make = torch.Generator().manual_seed(0)
    x = torch.randn(3, length, 8, dtype=torch.float64, generator=make).requires_grad_()
    k = torch.randn(kernels, length, dtype=torch.float64, generator=make).requires_grad_()
    ours, exact = toeplitz_conv(x, k, reverse), long_conv(x, k, reverse)
    torch.testing.assert_close(ours, exact)
    dy = torch.randn(ours.shape, dtype=torch.float64, generator=make)
    for a, b in zip(*(torch.autograd.grad(y, [x, k], dy) for y in (ours, exact)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_toeplitz_product_is_for_short_sequences_of_many_channels_a_kernel():
    assert pays(torch.zeros(1, 128, 64), 2)
    assert not pays(torch.zeros(1, 129, 64), 2)
    assert not pays(torch.zeros(1, 128, 64), 4)


def test_fast_lengths_hold_the_sequence_and_little_more():
    for least in [*range(1, 300), 131_071, 1_048_577]:
        n = fast_length(least)
        assert least <= n < max(1.34 * least, least + 2)


def test_vandermonde_is_its_definition_however_it_is_cut(monkeypatch):
    make = torch.Generator().manual_seed(0)
    c, z = (torch.randn(3, 4, dtype=torch.complex128, generator=make) * 0.1 for _ in range(2))
    exact = 2 * (c[..., None] * torch.exp(z[..., None] * torch.arange(21))).sum(1).real
    monkeypatch.setattr("mambagen.kernels.s4d.vandermonde.SLAB", 1)
    torch.testing.assert_close(vandermonde_product(c, z, 21), exact, rtol=1e-13, atol=1e-13)
    c.requires_grad_(), z.requires_grad_()
    assert torch.autograd.gradcheck(lambda c, z: vandermonde_product(c, z, 21), (c, z), fast_mode=True)


def test_operations_are_registered_in_full():
    make = torch.Generator().manual_seed(0)
    x, k = torch.randn(2, 9, 4, generator=make).requires_grad_(), torch.randn(2, 9, generator=make).requires_grad_()
    torch.library.opcheck(torch.ops.mambagen.long_conv.default, (x, k, None, False, "torch"))
    skip = torch.randn(4, generator=make).requires_grad_()
    torch.library.opcheck(torch.ops.mambagen.long_conv.default, (x, k, skip, True, "torch"))
    c = torch.randn(2, 3, dtype=torch.complex64, generator=make).requires_grad_()
    z = (torch.randn(2, 3, dtype=torch.complex128, generator=make) * 0.1).requires_grad_()
    torch.library.opcheck(torch.ops.mambagen.s4d_vandermonde.default, (c, z, 9, "torch"))


def test_nothing_as_large_as_length_times_state_times_channels_is_made():
    """8 channels with 32 states and 2^13 steps: such a tensor would hold 2^21 elements, complex ones twice."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for v in out if isinstance(out, tuple | list) else [out]:
                if isinstance(v, torch.Tensor):
                    self.elements = max(self.elements, v.numel())
            return out

    case = draw(batch=1, length=2**13, channels=8, ssms=8, state=32)
    with Largest() as seen:
        run(case, "torch")
    assert seen.elements <= 2**18


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 37)}, "x must be a real"),
        ({"x": torch.zeros(2, 0, 6)}, "empty"),
        ({"A": torch.zeros(4, 5)}, "ssms dividing 6 channels"),
        ({"dt": torch.ones(3)}, "dt has shape"),
        ({"initial_state": torch.zeros(2, 6, 5)}, "must be complex"),
        ({"resets": torch.zeros(2, 36)}, "resets has shape"),
        ({"discretisation": "euler"}, "zoh, bilinear"),
        ({"backend": "cuda"}, "one of auto, triton"),
    ],
    ids=lambda v: v if isinstance(v, str) else next(iter(v)),
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        s4d(**{**draw(), **change})
