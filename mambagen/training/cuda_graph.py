"""One piece's forward and backward as a CUDA graph: a step of a small model is otherwise bound by launching kernels.

A graph replays what was recorded, on the same addresses: inputs are copied into its own tensors, gradients are added
into tensors that it keeps for the parameters. Every piece must have the shapes of the one that it was recorded with.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

MAX_TOKENS = 1 << 18  # in a piece: beyond it the GPU is busy anyway, and a graph would only hold memory
WARM_UP = 3  # passes before recording, so that kernels are compiled and library handles made


class GraphedPass:
    """`call(piece, targets)` adds the gradient of the piece's loss / targets and returns the loss, on the device."""

    def __init__(
        self, model: nn.Module, loss: Callable[[dict[str, Tensor]], Tensor], example: dict[str, Tensor]
    ) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._gradients = [torch.zeros_like(p) for p in self._parameters]
        self._inputs = {name: tensor.clone() for name, tensor in example.items()}
        self._scale = torch.ones((), device=self._parameters[0].device)
        self._lend()

        def run() -> Tensor:
            value = loss(self._inputs)
            (value * self._scale).backward()
            return value.detach()

        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run()
        here.wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that prepares batches may allocate pinned memory meanwhile
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._loss = run()
        for p in self._parameters:
            p.grad = None

    def fits(self, piece: dict[str, Tensor]) -> bool:
        """Whether the piece has the shapes that were recorded."""
        return all(
            name in self._inputs
            and tensor.shape == self._inputs[name].shape
            and tensor.dtype == self._inputs[name].dtype
            for name, tensor in piece.items()
        )

    def __call__(self, piece: dict[str, Tensor], targets: int) -> Tensor:
        """Add to the parameters' gradients; the first piece after `zero_grad(set_to_none=True)` begins from zero."""
        if self._parameters[0].grad is None:
            torch._foreach_zero_(self._gradients)
            self._lend()
        for name, tensor in piece.items():
            self._inputs[name].copy_(tensor, non_blocking=True)
        self._scale.fill_(1 / targets)
        self._graph.replay()
        return self._loss.clone()

    def _lend(self) -> None:
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient


def record(
    model: nn.Module, loss: Callable[[dict[str, Tensor]], Tensor], example: dict[str, Tensor]
) -> GraphedPass | None:
    """A graph for pieces like `example`, or None: no GPU, nothing to gain, or the pass cannot be recorded."""
    sizes = [tensor.numel() for tensor in example.values() if tensor.is_cuda]
    if not sizes or max(sizes) > MAX_TOKENS:
        return None
    try:
        return GraphedPass(model, loss, example)
    except RuntimeError as error:
        torch.cuda.synchronize()
        logging.getLogger("mambagen").debug("no CUDA graph: %s", error)
        return None
