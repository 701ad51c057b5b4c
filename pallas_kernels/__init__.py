"""Kernels of polynomial linear attention; knows jax only.

`polynomial_attention` is the whole-sequence operator, differentiable and
linear in time; `polynomial_attention_step` is one token of it.
"""

from pallas_kernels.documents import (
  document_runs as document_runs,
  document_starts as document_starts,
)
from pallas_kernels.polynomial import (
  BASED as BASED,
  IMPLEMENTATIONS as IMPLEMENTATIONS,
  REBASED as REBASED,
  Coefficients as Coefficients,
  State as State,
  polynomial_attention as polynomial_attention,
  polynomial_attention_at as polynomial_attention_at,
  polynomial_attention_step as polynomial_attention_step,
  polynomial_attention_weights as polynomial_attention_weights,
  which_implementation as which_implementation,
  zero_state as zero_state,
)
from pallas_kernels.sharding import ShardAxes as ShardAxes
