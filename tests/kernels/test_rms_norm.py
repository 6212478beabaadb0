"""RMSNorm with its residual against torch's own in float64."""

import os

import pytest
import torch

from mambagen.kernels.rms_norm import rms_norm_backward, rms_norm_forward

BACKENDS = ["torch", *(["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else [])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "d"), [(1, 8), (7, 24), (130, 64), (33, 256)])
def test_value_and_gradients_equal_torch_in_float64(
    rows: int, d: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "torch":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    torch.manual_seed(rows)
    x, g, residual = torch.randn(3, rows, d).unbind(0)
    weight = torch.rand(d) + 0.5
    y, rstd = rms_norm_forward(x, weight, 1e-5, torch.float32)
    dx, dweight = rms_norm_backward(g, x, weight, rstd, residual)

    wide, wide_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    want = torch.nn.functional.rms_norm(wide, (d,), wide_weight, 1e-5)
    want.backward(g.double())
    assert wide.grad is not None
    assert wide_weight.grad is not None
    for got, expected in ((y, want), (dx, wide.grad + residual), (dweight, wide_weight.grad)):
        assert (got - expected).norm() <= 1e-6 * expected.norm()
