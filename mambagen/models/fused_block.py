"""The residual Mamba block as one autograd function: what its backward needs is mostly computed again, not kept.

`fused_block` gives what `mamba_block_forward` gives (without a carried state), calling the kernels directly. What a
layer keeps for its backward, in bytes a token for bfloat16 compute, d = d_model, E = 2d, N = 16:

    keep      kept                                                               bytes a token
    "all"     the residual x (float32), xz, the scan's output and saved states   4d + 8d + 4d + 16d
    "input"   x alone: 2 d bfloat16 values; the rest is computed again           4d

The convolution's output, dt and the normalised input are computed again in either case: they cost little.

The rank of dt is padded with zeros to a multiple of 8, so that rows of what x_proj says, and B and C in them, lie on 16
bytes: matrix products and the scan's loads are slow elsewhere, and a U-Net's outermost level has a rank of 4.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mambagen.kernels.dispatch import backend_module, choose_backend
from mambagen.kernels.rms_norm import rms_norm_backward, rms_norm_forward
from mambagen.models.mamba_mixer import MixerWeights

KEEP = ("all", "input")
ALIGNED = 8  # bfloat16 values in 16 bytes
SHARE = 0.3  # of the GPU's memory that kept tensors may take before everything but the input is computed again


def fused_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_epsilon: float,
    weights: MixerWeights,
    resets: Tensor | None = None,
    keep: str = "all",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """x + mixer(norm(x)), differentiable once.

    Args:
        x: the residual stream (batch, length, d_model), float32.
        norm_weight, norm_epsilon, weights: as `mamba_block_forward` takes them, float32.
        resets: (batch, length) bool, True where a packed document begins.
        keep: what is kept for the backward, see above.
        dtype: the precision of the projections and of the scan's inputs (states and sums are float32).
        backend: of the two kernels.

    Returns:
        (batch, length, d_model) float32.
    """
    if keep not in KEEP:
        raise ValueError(f"keep is {keep!r}; it must be one of {', '.join(KEEP)}")
    options = _Options(norm_epsilon, dtype, backend, keep)
    parameters = (norm_weight, *weights)
    if torch.is_grad_enabled() and any(v.requires_grad for v in (x, *parameters)):
        out = _Block.apply(x, resets, options, *parameters)
        assert isinstance(out, Tensor)
        return out
    return _run(x, resets, options, *parameters)[0]


def what_to_keep(x: Tensor, n_layer: int) -> str:
    """The fastest `keep` whose tensors fit: x is the residual stream (batch, length, d_model) of an n_layer stack."""
    kept = n_layer * x.numel() * 32
    return "all" if kept < SHARE * _memory(x.device.index) else "input"


@functools.cache
def _memory(device: int) -> int:
    return torch.cuda.get_device_properties(device).total_memory


class _Options:
    """What is not a tensor."""

    def __init__(self, epsilon: float, dtype: torch.dtype, backend: str, keep: str) -> None:
        self.epsilon, self.dtype, self.backend, self.keep = epsilon, dtype, backend, keep


class _Inside:
    """The block's inner tensors, in the order in which they come; rows = batch * length."""

    normal: Tensor  # (rows, d): the normalised input
    rstd: Tensor  # (rows,)
    xz: Tensor  # (batch, length, 2E)
    x: Tensor  # (batch, length, E): convolved
    selected: Tensor  # (batch, length, R + 2N): low-rank dt, B, C; R is the padded rank
    dt: Tensor  # (batch, length, E)
    y: Tensor  # (batch, length, E): the scan's output, gated
    states: Tensor  # what the scan saved


def _project(v: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(v.reshape(-1, v.shape[-1]), weight.t()).view(*v.shape[:-1], weight.shape[0])


def _until_scan(x: Tensor, resets: Tensor | None, o: _Options, xz: Tensor | None, *parameters: Tensor) -> _Inside:
    """Everything before the scan; xz is computed unless it is given."""
    norm_weight, in_proj, conv_weight, conv_bias, *_ = parameters
    x_proj, dt_proj = _padded(parameters)
    batch, length, d = x.shape
    rank = dt_proj.shape[1]
    v = _Inside()
    v.normal, v.rstd = rms_norm_forward(x.reshape(-1, d), norm_weight, o.epsilon, o.dtype)
    v.xz = _project(v.normal, in_proj.to(o.dtype)).view(batch, length, -1) if xz is None else xz
    convolve = _convolution(v.xz, conv_weight, o).forward
    v.x, _ = convolve(
        v.xz.chunk(2, -1)[0], conv_weight.squeeze(1).float().contiguous(), conv_bias.float(), True, None, resets, False
    )
    v.selected = _project(v.x, x_proj.to(o.dtype))
    v.dt = _project(v.selected[..., :rank], dt_proj.to(o.dtype))
    return v


def _padded(parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """x_proj (R + 2N, E) and dt_proj (E, R) with zeros in the places of the ranks that there are not."""
    x_proj, dt_proj = parameters[4:6]
    rank = dt_proj.shape[1]
    more = -rank % ALIGNED
    if not more:
        return x_proj, dt_proj
    nothing = x_proj.new_zeros(more, x_proj.shape[1])
    return torch.cat([x_proj[:rank], nothing, x_proj[rank:]]), F.pad(dt_proj, (0, more))


def _run(
    x: Tensor, resets: Tensor | None, o: _Options, *parameters: Tensor, save: bool = False
) -> tuple[Tensor, _Inside]:
    v = _until_scan(x, resets, o, None, *parameters)
    _scan(v, resets, o, save, *parameters)
    out_proj = parameters[9]
    return x + _project(v.y, out_proj.to(o.dtype)), v


def _scan(v: _Inside, resets: Tensor | None, o: _Options, save: bool, *parameters: Tensor) -> None:
    v.y, _, v.states = _scan_module(v, o, parameters).forward(
        *_scan_inputs(v, parameters), True, None, resets, False, save
    )


def _scan_inputs(v: _Inside, parameters: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    dt_bias, A_log, D = parameters[6:9]
    B, C = (part.unsqueeze(2) for part in v.selected[..., -2 * A_log.shape[1] :].chunk(2, -1))
    return v.x, v.dt, -torch.exp(A_log.float()), B, C, D.float(), v.xz.chunk(2, -1)[1], dt_bias.float()


def _scan_module(v: _Inside, o: _Options, parameters: tuple[Tensor, ...]) -> Any:
    channels, state = parameters[7].shape
    name = choose_backend("selective_scan", o.backend, v.x, state=state, groups=1, channels=channels)
    return backend_module("selective_scan", name)


def _convolution(xz: Tensor, weight: Tensor, o: _Options) -> Any:
    return backend_module("causal_conv1d", choose_backend("causal_conv1d", o.backend, xz, width=weight.shape[-1]))


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dy^T x over all rows, float32."""
    dy, x = dy.reshape(-1, dy.shape[-1]).t(), x.reshape(-1, x.shape[-1])
    if dy.is_cuda and dy.dtype != torch.float32:
        return torch.mm(dy, x, out_dtype=torch.float32)
    return torch.mm(dy, x).float()


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, resets: Tensor | None, o: _Options, *parameters: Tensor) -> Tensor:
        keeps = o.keep == "all"
        out, v = _run(x, resets, o, *parameters, save=keeps)
        ctx.o, ctx.count = o, len(parameters)
        ctx.save_for_backward(x, resets, *parameters, *((v.xz, v.y, v.states) if keeps else ()))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        o: _Options = ctx.o
        x, resets, *rest = ctx.saved_tensors
        parameters, kept = tuple(rest[: ctx.count]), rest[ctx.count :]
        norm_weight, in_proj, conv_weight, *_, out_proj = parameters
        x_proj, dt_proj = _padded(parameters)
        rank, width, d = dt_proj.shape[1], conv_weight.shape[-1], x.shape[-1]
        own = parameters[5].shape[1]  # the rank without what pads it

        v = _until_scan(x, resets, o, kept[0] if kept else None, *parameters)
        if kept:
            v.y, v.states = kept[1:]
        else:
            _scan(v, resets, o, True, *parameters)

        dout = dout.contiguous()
        dh = dout.to(o.dtype)
        d_out_proj = _weight_gradient(dh, v.y)
        del v.y
        dy = _project(dh, out_proj.to(o.dtype).t())

        dxz = torch.empty_like(v.xz)
        dx_half, dz_half = dxz.chunk(2, -1)
        module = _scan_module(v, o, parameters)
        inputs = _scan_inputs(v, parameters)
        direct = {"dz_out": dz_half} if getattr(module, "WRITES_INTO", False) else {}
        dx, ddt, dA, dB, dC, dD, dz, ddt_bias, _ = module.backward(
            dy, None, *inputs, True, None, resets, False, v.states, **direct
        )
        if not direct:
            dz_half.copy_(dz)
        del v.states, dy

        d_dt_proj = _weight_gradient(ddt, v.selected[..., :rank])[:, :own]
        d_selected = torch.cat([_project(ddt, dt_proj.to(o.dtype).t()), dB.flatten(2), dC.flatten(2)], -1)
        d_x_proj = _weight_gradient(d_selected, v.x)
        if own < rank:
            d_x_proj = torch.cat([d_x_proj[:own], d_x_proj[rank:]])
        dx.view(-1, dx.shape[-1]).addmm_(d_selected.flatten(0, 1), x_proj.to(o.dtype))

        conv = _convolution(v.xz, conv_weight, o)
        direct = {"dx_out": dx_half} if getattr(conv, "WRITES_INTO", False) else {}
        dx_conv, d_conv_weight, d_conv_bias, _ = conv.backward(
            dx, None, v.xz.chunk(2, -1)[0], conv_weight.squeeze(1).float().contiguous(), parameters[3].float(),
            True, None, resets, False, **direct,
        )  # fmt: skip
        if not direct:
            dx_half.copy_(dx_conv)
        d_in_proj = _weight_gradient(dxz, v.normal)
        d_normal = _project(dxz, in_proj.to(o.dtype).t())
        dx, d_norm = rms_norm_backward(
            d_normal.view(-1, d), x.reshape(-1, d), norm_weight.float(), v.rstd, dout.view(-1, d)
        )
        gradients = (
            d_norm, d_in_proj, d_conv_weight.view(-1, 1, width), d_conv_bias, d_x_proj, d_dt_proj, ddt_bias,
            dA * inputs[2], dD, d_out_proj,
        )  # fmt: skip
        return dx.view_as(x), None, None, *(g.to(p.dtype) for g, p in zip(gradients, parameters, strict=True))
