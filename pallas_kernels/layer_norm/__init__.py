"""Layer normalisation: `layer_norm`, and `add_layer_norm` of a residual sum.

`operator.py` has the public functions and their derivatives, `xla.py` the
equations in XLA, `gpu.py` the Hopper kernels of `add_layer_norm`.
`reference_layer_norm` is `layer_norm` with derivatives of any kind and order.
"""

from pallas_kernels.layer_norm.operator import (
  add_layer_norm as add_layer_norm,
  layer_norm as layer_norm,
)
from pallas_kernels.layer_norm.xla import (
  reference_layer_norm as reference_layer_norm,
  residual_sum as residual_sum,
)

__all__ = [
  "add_layer_norm",
  "layer_norm",
  "reference_layer_norm",
  "residual_sum",
]
