"""Short causal convolutions over packed documents: `gated_conv`, `causal_conv`.

`operator.py` has the public functions and the kernel's derivative, `xla.py` the
convolution in XLA, `gpu.py` the Hopper kernel of the backward.
"""

from pallas_kernels.gated_conv.operator import (
  causal_conv as causal_conv,
  gated_conv as gated_conv,
  has_kernel as has_kernel,
)

__all__ = ["causal_conv", "gated_conv", "has_kernel"]
