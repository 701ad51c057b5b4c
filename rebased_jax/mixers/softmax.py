"""Causal softmax attention: over chosen positions and documents, or by cuDNN.

    a_ts = softmax_s( q_t·k_s / √F ),   o_t = Σ_s a_ts v_s

over the s that a mask shows to t. In plain XLA the scores are held whole,
(B, H, T, S).
"""

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels import document_runs, document_starts, numerics
from pallas_kernels.numerics import product_precision, sum_dtype

ROTARY_BASE = 10000.0


def thirds(linear: nnx.Linear, x_BTD: Array) -> list[Array]:
  """The thirds of its output, which are not copied out of one array."""
  third = lambda p: jnp.split(p[...].astype(x_BTD.dtype), 3, axis=-1)
  # XLA would join the products again.
  pairs = (
    jax.lax.optimization_barrier((x_BTD, kernel_DD))
    for kernel_DD in third(linear.kernel)
  )
  parts = [x_BTD @ kernel_DD for x_BTD, kernel_DD in pairs]
  if linear.bias is None:
    return parts
  biases = jnp.split(linear.bias[...], 3)
  return [numerics.add_bias(*pair) for pair in zip(parts, biases, strict=True)]


def attend(
  q_BTHF: Array,
  k_BSHF: Array,
  v_BSHF: Array,
  mask_BTS: Array,
  *,
  documents: bool,
) -> Array:
  """o_BTHF = Σ_s a_ts v_s over the s that the mask shows to t; plain XLA.

  With `documents`, an Inf or NaN in q, k or v of a token is kept from all rows
  that do not see the token, gradients included, and makes NaN of the others: a
  weight of 0 would not stop it.
  """
  if documents:
    finite = lambda x: jnp.isfinite(x).all(axis=(-2, -1))
    own_BT, seen_BS = finite(q_BTHF), finite(k_BSHF) & finite(v_BSHF)
    spoilt_BT = ~own_BT | (mask_BTS & ~seen_BS[:, None]).any(axis=-1)
    q_BTHF = jnp.where(own_BT[..., None, None], q_BTHF, 0)
    k_BSHF, v_BSHF = (
      jnp.where(seen_BS[..., None, None], x, 0) for x in (k_BSHF, v_BSHF)
    )
  a_BHTS = weights(q_BTHF, k_BSHF, mask_BTS).astype(v_BSHF.dtype)
  o_BTHF = jnp.einsum(
    "bhts,bshf->bthf",
    a_BHTS,
    v_BSHF,
    precision=product_precision(v_BSHF.dtype),
    preferred_element_type=sum_dtype(v_BSHF.dtype),
  ).astype(v_BSHF.dtype)
  if not documents:
    return o_BTHF
  return jnp.where(spoilt_BT[..., None, None], jnp.nan, o_BTHF)


def by_cudnn(q_BTHF: Array, k_BTHF: Array, v_BTHF: Array) -> Array:
  """o_BTHF of rows that are one document each, on an NVIDIA GPU."""
  T = q_BTHF.shape[1]
  # jax refuses the gradient of an odd length; no token sees the one behind it.
  even = lambda x: jnp.pad(x, ((0, 0), (0, T % 2), (0, 0), (0, 0)))
  o_BTHF = jax.nn.dot_product_attention(
    even(q_BTHF),
    even(k_BTHF),
    even(v_BTHF),
    is_causal=True,
    implementation="cudnn",
  )
  return o_BTHF[:, :T]


def weights(q_BTHF: Array, k_BSHF: Array, mask_BTS: Array) -> Array:
  """a_BHTS in float32, or float64 of float64; NaN in a row that sees none."""
  s_BHTS = jnp.einsum(
    "bthf,bshf->bhts",
    q_BTHF,
    k_BSHF,
    precision=product_precision(q_BTHF.dtype),
    preferred_element_type=sum_dtype(q_BTHF.dtype),
  )
  s_BHTS = s_BHTS * q_BTHF.shape[-1] ** -0.5
  return jax.nn.softmax(jnp.where(mask_BTS[:, None], s_BHTS, -jnp.inf))


def turn(x_BTHF: Array, steps_BT: Array) -> Array:
  """Rotary position embedding at these positions, angles in float32."""
  planes = x_BTHF.shape[-1] // 2
  acc = sum_dtype(x_BTHF.dtype)
  rate_11K = (
    ROTARY_BASE ** (-jnp.arange(planes, dtype=acc) / planes)[None, None]
  )
  angle_BTK = steps_BT[..., None].astype(acc) * rate_11K
  cos, sin = jnp.cos(angle_BTK)[:, :, None], jnp.sin(angle_BTK)[:, :, None]
  x, y = jnp.split(x_BTHF.astype(acc), 2, axis=-1)
  turned = jnp.concatenate([x * cos - y * sin, y * cos + x * sin], axis=-1)
  return turned.astype(x_BTHF.dtype)


def runs(segment_ids: Array | None, T: int) -> Array:
  """The number of each token's document in its row, (B, T) or (1, T)."""
  if segment_ids is None:
    return jnp.zeros((1, T), jnp.int32)
  return document_runs(segment_ids)


def steps(runs_BT: Array) -> Array:
  """How many tokens of its document in the row are before each token."""
  t_1T = jnp.arange(runs_BT.shape[1], dtype=jnp.int32)[None]
  return t_1T - document_starts(runs_BT)


def visible(runs_BT: Array, positions_BM: Array | None = None) -> Array:
  """mask_BMT: which tokens each position sees, or (B, T, T) of all."""
  s_1T = jnp.arange(runs_BT.shape[1], dtype=jnp.int32)[None]
  t_BM, runs_BM = s_1T, runs_BT
  if positions_BM is not None:
    t_BM = positions_BM.clip(0, runs_BT.shape[1] - 1)
    rows_BT = jnp.broadcast_to(runs_BT, (len(t_BM), runs_BT.shape[1]))
    runs_BM = jnp.take_along_axis(rows_BT, t_BM, axis=1)
  causal_BMT = t_BM[..., None] >= s_1T[:, None]
  return causal_BMT & (runs_BM[..., None] == runs_BT[:, None])
