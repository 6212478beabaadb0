"""The fused block against the block written with the two ops: outputs and every gradient."""

import pytest
import torch

from mambagen.models import MambaConfig
from mambagen.models.fused_block import fused_block
from mambagen.models.mamba_block import MambaBlock, mamba_block_forward

CONFIG = MambaConfig(d_model=32, n_layer=2)


def case(length: int, with_resets: bool) -> tuple[MambaBlock, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    torch.manual_seed(length)
    block = MambaBlock(CONFIG)
    with torch.no_grad():
        block.norm.weight.uniform_(0.5, 1.5)
        block.mixer.D.uniform_(0.5, 1.5)
    x, g = torch.randn(2, 2, length, CONFIG.d_model).unbind(0)
    resets = torch.rand(2, length) < 0.1 if with_resets else None
    return block, x, g, resets


def gradients(out: torch.Tensor, g: torch.Tensor, x: torch.Tensor, block: MambaBlock) -> dict[str, torch.Tensor]:
    names, parameters = zip(*block.named_parameters(), strict=True)
    values = torch.autograd.grad(out, (x, *parameters), g)
    return dict(zip(("x", *names), values, strict=True))


@pytest.mark.parametrize("keep", ["all", "input"])
@pytest.mark.parametrize(("length", "with_resets"), [(1, False), (37, False), (37, True), (200, True)])
def test_fused_block_equals_the_block_of_ops(keep: str, length: int, with_resets: bool) -> None:
    block, x, g, resets = case(length, with_resets)
    x.requires_grad_()
    weights = block.mixer.weights()
    plain, _ = mamba_block_forward(x, block.norm.weight, block.norm.epsilon, weights, None, resets)
    fused = fused_block(x, block.norm.weight, block.norm.epsilon, weights, resets, keep)
    assert (fused - plain).norm() <= 1e-6 * plain.norm()
    want, got = gradients(plain, g, x, block), gradients(fused, g, x, block)
    for name, value in want.items():
        assert (got[name] - value).norm() <= 2e-6 * value.norm() + 1e-9, name


def test_without_gradients_nothing_is_kept_and_the_values_are_the_same() -> None:
    block, x, _, _ = case(50, False)
    with torch.no_grad():
        fused = fused_block(x, block.norm.weight, block.norm.epsilon, block.mixer.weights())
        plain, _ = mamba_block_forward(x, block.norm.weight, block.norm.epsilon, block.mixer.weights())
    assert fused.grad_fn is None
    assert (fused - plain).norm() <= 1e-6 * plain.norm()


def test_bfloat16_compute_stays_near_float32() -> None:
    block, x, g, _ = case(64, False)
    x.requires_grad_()
    weights = block.mixer.weights()
    wide = fused_block(x, block.norm.weight, block.norm.epsilon, weights)
    low = fused_block(x, block.norm.weight, block.norm.epsilon, weights, dtype=torch.bfloat16, keep="input")
    assert low.dtype == torch.float32
    assert (low - wide).norm() <= 0.01 * (wide - x).norm()
    want, got = gradients(wide, g, x, block), gradients(low, g, x, block)
    for name, value in want.items():
        assert got[name].dtype == torch.float32
        assert (got[name] - value).norm() <= 0.03 * value.norm(), name


def test_an_unknown_keep_is_refused() -> None:
    block, x, _, _ = case(4, False)
    with pytest.raises(ValueError, match="keep is 'some'"):
        fused_block(x, block.norm.weight, 1e-5, block.mixer.weights(), keep="some")
