"""The operations: plain functions on channels-last tensors, each with a float64 reference and several backends.

Nothing here knows of models, data or training.
"""

from mambagen.kernels.causal_conv1d import causal_conv1d
from mambagen.kernels.selective_scan import selective_scan

__all__ = ["causal_conv1d", "selective_scan"]
