"""The scan of Mamba over packed documents: `selective_scan`.

`operator.py` has the public function and its derivative, all in XLA.
"""

from pallas_kernels.selective_scan.operator import (
  selective_scan as selective_scan,
)

__all__ = ["selective_scan"]
