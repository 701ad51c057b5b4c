"""Differentiable operators for JAX: Pallas kernels, and XLA everywhere else.

Every operator is a function of arrays with its derivative. It runs a kernel
where there is one for the device and the call, and XLA otherwise.

| operator                       | what it computes                            |
|--------------------------------|---------------------------------------------|
| `polynomial_attention`         | causal linear attention (Based, ReBased)    |
| `polynomial_attention_step`    | the same, one token a row from a state      |
| `polynomial_attention_at`      | the same, at a few positions only           |
| `polynomial_attention_weights` | its matrix of weights, to look at           |
| `layer_norm`                   | layer normalisation                         |
| `add_layer_norm`               | a residual sum and its layer norm           |
| `gelu`                         | the exact GELU of x + bias                  |
| `gated_conv`                   | a short causal convolution with a gate      |
| `causal_conv`                  | a short causal convolution with a state     |
| `cross_entropy`                | loss of a tied head, without whole logits   |
| `selective_scan`               | the scan of Mamba                           |
| `wkv`                          | the recurrence of RWKV-4                    |
| `wkv_step`                     | the same, one token a row from a state      |

Kernels: Hopper GPUs and TPUs for `polynomial_attention`; Hopper GPUs for
`add_layer_norm`, `gelu`, the backward of `gated_conv`, and `cross_entropy`.

Arrays have the batch first: (B, T, …). Rows may hold packed documents, given by
`segment_ids` (B, T); `document_runs` and `document_starts` read them. Over a
mesh an operator takes `axes`, a `ShardAxes` with the names of the mesh axes
that split batch, heads and time.

Each operator is also a package of the same name. `pallas_kernels.gelu` is the
function; import modules of the package by `from pallas_kernels.gelu import …`.
"""

from pallas_kernels.cross_entropy import (
  TokenLosses as TokenLosses,
  cross_entropy as cross_entropy,
)
from pallas_kernels.documents import (
  document_runs as document_runs,
  document_starts as document_starts,
)
from pallas_kernels.gated_conv import (
  causal_conv as causal_conv,
  gated_conv as gated_conv,
)
from pallas_kernels.gelu import gelu as gelu
from pallas_kernels.layer_norm import (
  add_layer_norm as add_layer_norm,
  layer_norm as layer_norm,
)
from pallas_kernels.plain_derivatives import (
  plain_derivatives as plain_derivatives,
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
from pallas_kernels.selective_scan import selective_scan as selective_scan
from pallas_kernels.sharding import ShardAxes as ShardAxes
from pallas_kernels.wkv import (
  WKVState as WKVState,
  empty_wkv_state as empty_wkv_state,
  wkv as wkv,
  wkv_step as wkv_step,
)

__all__ = [
  "BASED",
  "IMPLEMENTATIONS",
  "REBASED",
  "Coefficients",
  "ShardAxes",
  "State",
  "TokenLosses",
  "WKVState",
  "add_layer_norm",
  "causal_conv",
  "cross_entropy",
  "document_runs",
  "document_starts",
  "empty_wkv_state",
  "gated_conv",
  "gelu",
  "layer_norm",
  "plain_derivatives",
  "polynomial_attention",
  "polynomial_attention_at",
  "polynomial_attention_step",
  "polynomial_attention_weights",
  "selective_scan",
  "which_implementation",
  "wkv",
  "wkv_step",
  "zero_state",
]
