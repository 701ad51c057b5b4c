"""The exact GELU with a bias: `gelu`.

`operator.py` has the public function and the kernels' derivative, `xla.py` the
same in XLA, `gpu.py` the Hopper kernels.
"""

from pallas_kernels.gelu.operator import gelu as gelu

__all__ = ["gelu"]
