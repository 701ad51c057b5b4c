"""The recurrence of RWKV-4 over packed documents: `wkv`, `wkv_step`.

`operator.py` has the public functions and their derivative, `state.py` the two
running sums that they hand on.
"""

from pallas_kernels.wkv.operator import wkv as wkv, wkv_step as wkv_step
from pallas_kernels.wkv.state import (
  WKVState as WKVState,
  empty_wkv_state as empty_wkv_state,
)

__all__ = ["WKVState", "empty_wkv_state", "wkv", "wkv_step"]
