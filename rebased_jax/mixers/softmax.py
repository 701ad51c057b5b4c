"""Causal softmax attention of given queries, keys and values.

    a_ts = softmax_s( q_t·k_s / √F ),   o_t = Σ_s a_ts v_s

where s runs over the tokens that a mask shows to t. The XLA form holds all
scores (B, H, T, S) at once. cuDNN's form, for whole rows on a GPU, does not.
"""

import functools

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels import document_runs, document_starts, numerics
from pallas_kernels.by_platform import Kernels, differentiable_by_platform
from pallas_kernels.numerics import product_precision, sum_dtype

#: Base of the rotary angles, from arXiv 2104.09864.
ROTARY_BASE = 10000.0
_CUDNN = Kernels("cudnn", ("cuda",), "an NVIDIA GPU")


def project_to_thirds(linear: nnx.Linear, x_BTD: Array) -> list[Array]:
  """Return the three equal parts of a linear layer's output, (B, T, D) each.

  Each part is a separate product, so that no part is copied out of one large
  array.

  Args:
    linear: a layer with kernel (D, 3 D).
    x_BTD: its input.
  """

  def thirds(parameter: nnx.Param) -> list[Array]:
    return jnp.split(parameter[...].astype(x_BTD.dtype), 3, axis=-1)

  products = []
  for kernel_DD in thirds(linear.kernel):
    # Without the barrier XLA would join the three products again.
    x, kernel_DD = jax.lax.optimization_barrier((x_BTD, kernel_DD))
    products.append(jnp.matmul(x, kernel_DD, precision=linear.precision))
  if linear.bias is None:
    return products
  biases = jnp.split(linear.bias[...], 3)
  return [
    numerics.add_bias(product, bias)
    for product, bias in zip(products, biases, strict=True)
  ]


def attend(
  q_BTHF: Array,
  k_BSHF: Array,
  v_BSHF: Array,
  mask_BTS: Array,
  *,
  sees_all: bool = False,
  dropout: float = 0.0,
  dropout_key: Array | None = None,
) -> Array:
  """Return o (B, T, H, F) = Σ_s a_ts v_s, in plain XLA.

  Args:
    q_BTHF: queries.
    k_BSHF: keys.
    v_BSHF: values.
    mask_BTS: whether t sees s.
    sees_all: whether tokens that the mask hides are known to be finite, as in
      a cache that holds nothing else. Otherwise an Inf or NaN in a token's q, k
      or v is kept from every row that does not see the token, gradients
      included. A weight of 0 alone would not keep it out.
    dropout: probability p of dropping each weight a_ts. Kept weights are
      multiplied by 1 / (1 − p).
    dropout_key: a PRNG key, which switches dropout on. None: no dropout.
  """
  drop = dropout_key if dropout > 0 else None
  weighted = functools.partial(_weighted_values, dropout=dropout, key=drop)
  if sees_all:
    return weighted(q_BTHF, k_BSHF, v_BSHF, mask_BTS)

  def is_finite(x_BTHF: Array) -> Array:
    return jnp.isfinite(x_BTHF).all(axis=(-2, -1))

  own_BT = is_finite(q_BTHF)
  seen_BS = is_finite(k_BSHF) & is_finite(v_BSHF)
  spoilt_BT = ~own_BT | (mask_BTS & ~seen_BS[:, None]).any(axis=-1)
  o_BTHF = weighted(
    jnp.where(own_BT[..., None, None], q_BTHF, 0),
    jnp.where(seen_BS[..., None, None], k_BSHF, 0),
    jnp.where(seen_BS[..., None, None], v_BSHF, 0),
    mask_BTS,
  )
  return jnp.where(spoilt_BT[..., None, None], jnp.nan, o_BTHF)


def _weighted_values(
  q_BTHF: Array,
  k_BSHF: Array,
  v_BSHF: Array,
  mask_BTS: Array,
  *,
  dropout: float,
  key: Array | None,
) -> Array:
  a_BHTS = weights(q_BTHF, k_BSHF, mask_BTS)
  if key is not None:
    a_BHTS = nnx.Dropout(dropout)(a_BHTS, deterministic=False, rngs=key)
  return jnp.einsum(
    "bhts,bshf->bthf",
    a_BHTS.astype(v_BSHF.dtype),
    v_BSHF,
    precision=product_precision(v_BSHF.dtype),
    preferred_element_type=sum_dtype(v_BSHF.dtype),
  ).astype(v_BSHF.dtype)


def attend_by_cudnn(
  q_BTHF: Array, k_BTHF: Array, v_BTHF: Array, *, named: bool
) -> Array:
  """Return o (B, T, H, F) of rows of one document each.

  Args:
    q_BTHF: queries.
    k_BTHF: keys.
    v_BTHF: values.
    named: whether the caller insists on cuDNN. If not, a program that is
      lowered for another platform than NVIDIA GPUs runs XLA's form.

  Raises:
    NotImplementedError: cuDNN was named, and the program is lowered for another
      platform.
  """
  elsewhere = None if named else _attend_causally
  arrays = q_BTHF, k_BTHF, v_BTHF
  return differentiable_by_platform(
    _CUDNN, _attend_by_cudnn, elsewhere, *arrays
  )


def _attend_causally(q_BTHF: Array, k_BTHF: Array, v_BTHF: Array) -> Array:
  mask_1TS = visible(runs(None, q_BTHF.shape[1]))
  return attend(q_BTHF, k_BTHF, v_BTHF, mask_1TS)


def _attend_by_cudnn(q_BTHF: Array, k_BTHF: Array, v_BTHF: Array) -> Array:
  T = q_BTHF.shape[1]

  def pad_to_even(x_BTHF: Array) -> Array:
    # jax refuses the gradient of an odd length. The mask is causal, so no
    # token sees the padding after it.
    return jnp.pad(x_BTHF, ((0, 0), (0, T % 2), (0, 0), (0, 0)))

  o_BTHF = jax.nn.dot_product_attention(
    pad_to_even(q_BTHF),
    pad_to_even(k_BTHF),
    pad_to_even(v_BTHF),
    is_causal=True,
    implementation="cudnn",
  )
  return o_BTHF[:, :T]


def weights(q_BTHF: Array, k_BSHF: Array, mask_BTS: Array) -> Array:
  """Return a (B, H, T, S); a row that sees no token has NaN.

  The dtype is float32, or float64 if q is float64.
  """
  s_BHTS = jnp.einsum(
    "bthf,bshf->bhts",
    q_BTHF,
    k_BSHF,
    precision=product_precision(q_BTHF.dtype),
    preferred_element_type=sum_dtype(q_BTHF.dtype),
  )
  s_BHTS = s_BHTS * q_BTHF.shape[-1] ** -0.5
  return jax.nn.softmax(jnp.where(mask_BTS[:, None], s_BHTS, -jnp.inf))


def rotate(x_BTHF: Array, steps_BT: Array) -> Array:
  """Return x with rotary position embedding, in the dtype of x.

  Args:
    x_BTHF: queries or keys, with an even F.
    steps_BT: each token's position in its document. The angles are computed in
      float32, or in float64 if x is float64.
  """
  planes = x_BTHF.shape[-1] // 2
  acc = sum_dtype(x_BTHF.dtype)
  rate_11K = (
    ROTARY_BASE ** (-jnp.arange(planes, dtype=acc) / planes)[None, None]
  )
  angle_BTK = steps_BT[..., None].astype(acc) * rate_11K
  cos_BT1K = jnp.cos(angle_BTK)[:, :, None]
  sin_BT1K = jnp.sin(angle_BTK)[:, :, None]
  x, y = jnp.split(x_BTHF.astype(acc), 2, axis=-1)
  rotated = jnp.concatenate(
    [x * cos_BT1K - y * sin_BT1K, y * cos_BT1K + x * sin_BT1K], axis=-1
  )
  return rotated.astype(x_BTHF.dtype)


def runs(segment_ids: Array | None, T: int) -> Array:
  """Return the number of each token's document in its row, from 0.

  The shape is (B, T), or (1, T) without segment ids.
  """
  if segment_ids is None:
    return jnp.zeros((1, T), jnp.int32)
  return document_runs(segment_ids)


def steps(runs_BT: Array) -> Array:
  """Return each token's position in its document, from 0, as far as the row."""
  t_1T = jnp.arange(runs_BT.shape[1], dtype=jnp.int32)[None]
  return t_1T - document_starts(runs_BT)


def visible(runs_BT: Array, positions_BM: Array | None = None) -> Array:
  """Return a mask (B, M, T): whether position m sees token t.

  Args:
    runs_BT: the number of each token's document.
    positions_BM: positions in the row. None: all positions, and M = T.
  """
  T = runs_BT.shape[1]
  s_1T = jnp.arange(T, dtype=jnp.int32)[None]
  t_BM, runs_BM = s_1T, runs_BT
  if positions_BM is not None:
    t_BM = positions_BM.clip(0, T - 1)
    rows_BT = jnp.broadcast_to(runs_BT, (len(t_BM), T))
    runs_BM = jnp.take_along_axis(rows_BT, t_BM, axis=1)
  causal_BMT = t_BM[..., None] >= s_1T[:, None]
  return causal_BMT & (runs_BM[..., None] == runs_BT[:, None])
