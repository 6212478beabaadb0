"""The chunked convolution of S4D against the recurrence in float64, in Triton's interpreter."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from torch import Tensor

from mambagen.kernels.s4d import chunked, s4d, s4d_reference
from mambagen.kernels.s4d.discretise import coefficients

triton_kernels = pytest.importorskip("mambagen.kernels.s4d.chunked_triton")

ROUNDING = 5e-3  # of y and dx to bfloat16; the interpreter cuts where a GPU rounds


def system(ssms: int, state: int, channels: int, skip: bool) -> list[Tensor]:
    """dt, A, C and D in float64."""
    dt = torch.rand(ssms, dtype=torch.float64) * 0.2 + 0.01
    A = torch.complex(-torch.rand(ssms, state).double() * 0.6 - 0.02, torch.randn(ssms, state).double() * 8)
    C = torch.randn(ssms, state, dtype=torch.complex128)
    return [dt, A, C, *([torch.randn(channels).double()] if skip else [])]


def apart(ours: Tensor, other: Tensor) -> float:
    return float((ours.detach().to(other.dtype) - other.detach()).norm() / other.detach().norm())


@pytest.mark.parametrize(
    ("batch", "length", "channels", "ssms", "state", "reverse", "skip", "rounds"),
    [
        (2, 70, 20, 1, 5, False, True, 2),
        (1, 1, 16, 1, 16, False, False, 2),
        (3, 64, 16, 1, 16, True, True, 2),
        (1, 600, 17, 1, 8, False, True, 1),
        (1, 600, 40, 2, 8, True, False, 2),
        (2, 520, 80, 1, 3, True, True, 4),
    ],
)
def test_y_and_gradients_are_the_recurrences(
    batch: int, length: int, channels: int, ssms: int, state: int, reverse: bool, skip: bool, rounds: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(triton_kernels, "ROUNDS", rounds)
    torch.manual_seed(1)
    x, dy = torch.randn(2, batch, length, channels).bfloat16()
    wide = [v.requires_grad_() for v in (x.double(), *system(ssms, state, channels, skip))]
    y, _ = s4d_reference(*wide, reverse=reverse)
    y.backward(dy.double())

    narrow = [torch.complex64 if v.is_complex() else torch.float32 for v in wide]
    own = [x.clone().requires_grad_()]
    own += [v.detach().to(dtype).requires_grad_() for v, dtype in zip(wide[1:], narrow[1:], strict=True)]
    z, c = coefficients(*own[1:4], "zoh", torch.complex64, "torch")
    out = chunked.chunked_conv(own[0], c, z, reverse, own[4] if skip else None)
    out.backward(dy)

    assert apart(out, y) < ROUNDING
    assert apart(own[0].grad, wide[0].grad) < ROUNDING
    for mine, theirs in zip(own[1:], wide[1:], strict=True):
        assert apart(mine.grad, theirs.grad) < 1e-4


def test_a_long_memory_is_handed_on_through_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "ROUNDS", 8)
    c, z = torch.full((1, 1), 0.5 + 0j), torch.full((1, 1), -1e-4 + 0j, dtype=torch.complex128)
    x = torch.zeros(1, 64 * 40, 16, dtype=torch.bfloat16)
    x[0, 3] = 1
    assert triton_kernels._Cut(x, 1, 64).segments == 10
    y = chunked.chunked_conv(x, c, z)[0, :, 0].float()
    t = torch.arange(64 * 40) - 3
    assert torch.allclose(y, torch.where(t < 0, 0.0, torch.exp(-1e-4 * t)), atol=0, rtol=1 / 128)
    back = chunked.chunked_conv(x.flip(1), c, z, reverse=True)[0, :, 0].float()
    assert torch.equal(back.flip(0), y)


def test_any_strides() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 3, 90, dtype=torch.bfloat16).permute(1, 2, 0)
    c, z = torch.randn(1, 4, dtype=torch.complex64), torch.randn(1, 4, dtype=torch.complex128) - 3
    grads = []
    for v in (x, x.contiguous()):
        leaf, cc, zz = v.detach().requires_grad_(), c.clone().requires_grad_(), z.clone().requires_grad_()
        y = chunked.chunked_conv(leaf, cc, zz)
        y.backward(torch.ones((), dtype=torch.bfloat16).expand(y.shape))
        grads.append((y, leaf.grad, cc.grad, zz.grad))
    for mine, other in zip(*grads, strict=True):
        assert torch.equal(mine, other)


def test_the_op_takes_it_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 100, 32, dtype=torch.bfloat16)
    dt, A, C, D = (v.to(torch.complex64 if v.is_complex() else torch.float32) for v in system(2, 4, 32, True))
    resets = torch.zeros(2, 100, dtype=torch.bool)
    resets[0, 17] = resets[1, 70] = resets[1, 90] = True
    calls = []
    inner = chunked.chunked_conv
    monkeypatch.setattr(chunked, "chunked_conv", lambda *given: calls.append(1) or inner(*given))
    for borders in (None, resets):
        y = s4d(x, dt, A, C, D, resets=borders, backend="triton")
        other, _ = s4d_reference(x.double(), dt.double(), A.cdouble(), C.cdouble(), D.double(), resets=borders)
        assert apart(y, other) < ROUNDING
    assert len(calls) > 2
    calls.clear()
    s4d(x.float(), dt, A, C, D, backend="triton")  # float32 keeps the FFT
    s4d(x, *(v.repeat_interleave(8, 0) for v in (dt, A, C)), D, backend="triton")  # as do systems of two channels
    assert not calls


def test_it_needs_hopper_and_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        is_cuda, dtype, shape, device = True, torch.bfloat16, (2, 100, 64), torch.device("cuda:0")

    for hopper in (True, False):
        monkeypatch.setattr(chunked, "is_hopper", lambda device, answer=hopper: answer)
        assert chunked.pays(Gpu(), 1, 64) == hopper  # type: ignore[arg-type]
    for dtype, channels, ssms, state, fits in (
        (torch.bfloat16, 64, 4, 64, True), (torch.bfloat16, 64, 8, 64, False), (torch.bfloat16, 64, 1, 65, False),
        (torch.float16, 64, 1, 8, False), (torch.float32, 64, 1, 8, False),
    ):  # fmt: skip
        assert chunked.pays(torch.empty(1, 3, channels, dtype=dtype), ssms, state) == fits


def test_it_compiles_into_graphs_and_goes_through_the_registered_op() -> None:
    torch.library.opcheck(
        torch.ops.mambagen.s4d_chunked.default,
        (torch.randn(1, 5, 16, dtype=torch.bfloat16), torch.randn(1, 2, dtype=torch.complex64),
         torch.randn(1, 2, dtype=torch.complex128) - 4, torch.randn(16), True),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
