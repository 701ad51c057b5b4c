"""Logits of a tied head, their losses and the losses' gradient, in XLA."""

from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from pallas_kernels import devices
from pallas_kernels.numerics import sum_dtype


class TokenLosses(NamedTuple):
  """Each token's loss; no gradient flows through it."""

  #: −log softmax(logits)[target], (B, M), float32.
  nll_BM: Array
  #: 1 where the target has the greatest logit, else 0; (B, M), float32.
  correct_BM: Array


def logits(
  x_D: Array,
  embedding_VD: Array,
  dtype: jax.typing.DTypeLike | None = None,
  *,
  precision: jax.lax.Precision | None = None,
) -> Array:
  """Return x Eᵀ (…, V), computed in x's dtype and summed in float32.

  Args:
    x_D: (…, D).
    embedding_VD: E, of any float dtype.
    dtype: of the result. None: that of the sums, float32, or float64 for
      float64 inputs.
    precision: of the product. None: jax's setting.
  """
  return jnp.einsum(
    "...d,vd->...v",
    x_D,
    embedding_VD.astype(x_D.dtype),
    precision=precision,
    preferred_element_type=sum_dtype(x_D.dtype) if dtype is None else dtype,
  )


def logits_backward(
  x_BMD: Array,
  embedding_VD: Array,
  dlogits_BMV: Array,
  *,
  precision: jax.lax.Precision | None,
) -> tuple[Array, Array]:
  """Return (dx, dE) of `logits`, each in the dtype of its primal.

  Args:
    x_BMD: (B, M, D).
    embedding_VD: E, of any float dtype.
    dlogits_BMV: the logits' cotangent, in x's dtype.
    precision: of the products. None: jax's setting.
  """
  dx_BMD = jnp.einsum(
    "bmv,vd->bmd",
    dlogits_BMV,
    embedding_VD.astype(x_BMD.dtype),
    precision=precision,
  )
  dembedding_VD = jnp.einsum(
    "bmv,bmd->vd",
    dlogits_BMV,
    x_BMD,
    precision=precision,
    preferred_element_type=sum_dtype(x_BMD.dtype),
  )
  return dx_BMD, dembedding_VD.astype(embedding_VD.dtype)


def token_losses_and_log_sums(
  logits_V: Array, targets: Array
) -> tuple[TokenLosses, Array]:
  """Return each token's loss, and log Σ exp z (…), of logits z (…, V).

  The result has derivatives of any kind and order in the logits.
  """
  log_sum, best = log_sum_and_best(logits_V)
  return losses_from_log_sums(logits_V, targets, log_sum, best), log_sum


def losses_from_log_sums(
  logits_V: Array, targets: Array, log_sum: Array, best: Array
) -> TokenLosses:
  """Return each token's loss.

  Args:
    logits_V: (…, V).
    targets: integers (…).
    log_sum: log Σ exp z (…).
    best: the first index of each token's greatest logit, (…).
  """
  of_target = _logit_of_target(logits_V, targets)
  nll = log_sum - of_target.astype(log_sum.dtype)
  return TokenLosses(nll, _is_correct(best, targets))


def losses_and_gradient(
  logits_V: Array, targets: Array, weights: Array
) -> tuple[TokenLosses, Array]:
  """Return each token's loss, and ∂(w nll)/∂z (…, V) in z's dtype."""
  wide_V = logits_V.astype(sum_dtype(logits_V.dtype))
  tokens, log_sum = token_losses_and_log_sums(wide_V, targets)
  dlogits_V = logits_gradient(wide_V, log_sum, targets, weights)
  return tokens, dlogits_V.astype(logits_V.dtype)


def log_sums_of(tokens: TokenLosses, logits_V: Array, targets: Array) -> Array:
  """Return log Σ exp z (…) of logits (…, V), whose losses are known."""
  of_target = _logit_of_target(logits_V, targets)
  return tokens.nll_BM + of_target.astype(tokens.nll_BM.dtype)


def add_z_loss_gradient(
  dlogits_V: Array, scaled_log_sum: Array, targets: Array, weights: Array
) -> Array:
  """Return ∂(w (nll + c l²))/∂z (…, V), with l = log Σ exp z.

  It is (1 + 2 c l) w (softmax z − onehot target) + 2 c l w onehot target. So it
  needs the gradient of w nll alone, and no softmax.

  Args:
    dlogits_V: w (softmax z − onehot target), the gradient of w nll.
    scaled_log_sum: c l (…).
    targets: integers (…).
    weights: w (…).
  """
  twice = 2 * scaled_log_sum[..., None]
  at_target_V = jnp.where(
    _is_target(dlogits_V, targets), twice * weights[..., None], 0
  )
  wide_V = dlogits_V.astype(scaled_log_sum.dtype)
  return ((1 + twice) * wide_V + at_target_V).astype(dlogits_V.dtype)


def _is_target(logits_V: Array, targets: Array) -> Array:
  """Return whether each index of the last axis is the target, (…, V)."""
  index_V = jax.lax.broadcasted_iota(
    targets.dtype, logits_V.shape, logits_V.ndim - 1
  )
  return index_V == targets[..., None]


def _logit_of_target(logits_V: Array, targets: Array) -> Array:
  """Return z_target (…), NaN for a target outside [0, V)."""
  V = logits_V.shape[-1]
  # A negative index would count from the end, and a large one could wrap.
  index = jnp.where(is_outside(targets, V), V, targets).astype(jnp.int32)
  return _take_logit(logits_V, index)


@jax.custom_jvp
def _take_logit(logits_V: Array, index: Array) -> Array:
  """Return z_index (…), NaN for index V.

  The gradient that jax makes is a scatter into an array of zeros, which XLA
  cannot fuse with the softmax. Ours compares each place with the index.
  """
  found = jnp.take_along_axis(
    logits_V, index[..., None], axis=-1, mode="fill", fill_value=jnp.nan
  )
  return found.take(0, axis=-1)


@_take_logit.defjvp
def _take_logit_tangent(primals, tangents):
  (logits_V, index), (dlogits_V, _) = primals, tangents
  at_index_V = jnp.where(_is_target(logits_V, index), dlogits_V, 0)
  return _take_logit(logits_V, index), at_index_V.sum(axis=-1)


def is_outside(targets: Array, V: int) -> Array:
  """Return whether a target is outside [0, V)."""
  return (targets < 0) | (targets >= V)


def _is_correct(best: Array, targets: Array) -> Array:
  """Return 1 where the greatest logit is the target's, else 0; float32."""
  # Not the other way round: a wide target may be out of best's range.
  return (best.astype(targets.dtype) == targets).astype(jnp.float32)


def log_sum_and_best(logits_V: Array) -> tuple[Array, Array]:
  """Return log Σ exp z and the first index of the greatest z, both (…).

  On a GPU one reduction makes both, which reads the logits once. On other
  devices XLA makes slow code of such a reduction, so there are two.
  """
  if devices.platform() == "gpu":
    return _in_one_reduction(logits_V)
  log_sum = jax.nn.logsumexp(logits_V, axis=-1)
  return log_sum, jnp.argmax(logits_V, axis=-1)


@jax.custom_jvp
def _in_one_reduction(logits_V: Array) -> tuple[Array, Array]:
  """Compute `log_sum_and_best` in one reduction.

  The derivative is our own because jax does not differentiate such a reduction.
  """
  axis = logits_V.ndim - 1
  least = jnp.asarray(jnp.finfo(logits_V.dtype).min, logits_V.dtype)
  zero = jnp.zeros((), logits_V.dtype)

  def join(a, b):
    (top_a, sum_a, at_a), (top_b, sum_b, at_b) = a, b
    is_a = (top_a > top_b) | ((top_a == top_b) & (at_a < at_b))
    top, bottom = jnp.maximum(top_a, top_b), jnp.minimum(top_a, top_b)
    share = jnp.exp(bottom - top)
    total = jnp.where(is_a, sum_a + share * sum_b, sum_b + share * sum_a)
    return top, total, jnp.where(is_a, at_a, at_b)

  top, total, best = jax.lax.reduce(
    (
      logits_V,
      jnp.ones_like(logits_V),
      jax.lax.broadcasted_iota(jnp.int32, logits_V.shape, axis),
    ),
    (least, zero, jnp.int32(0)),
    join,
    (axis,),
  )
  return top + jnp.log(total), best


@_in_one_reduction.defjvp
def _in_one_reduction_tangents(primals, tangents):
  (logits_V,), (dlogits_V,) = primals, tangents
  log_sum, best = _in_one_reduction(logits_V)
  softmax_V = jnp.exp(logits_V - log_sum[..., None])
  no_tangent = np.zeros(best.shape, jax.dtypes.float0)
  return (log_sum, best), ((softmax_V * dlogits_V).sum(axis=-1), no_tangent)


def logits_gradient(
  logits_V: Array, log_sum: Array, targets: Array, weights: Array
) -> Array:
  """Return ∂(w nll)/∂z = w (softmax z − onehot target), (…, V).

  Args:
    logits_V: z (…, V).
    log_sum: log Σ exp z (…).
    targets: integers (…).
    weights: w (…).
  """
  is_target_V = _is_target(logits_V, targets)
  softmax_V = jnp.exp(logits_V - log_sum[..., None])
  excess_V = softmax_V - is_target_V.astype(logits_V.dtype)
  return weights[..., None] * excess_V
