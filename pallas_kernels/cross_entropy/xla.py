"""Cross-entropy behind a tied head, a part of the logits at a time.

    z_t = E x_t,   nll_t = log Σ_v exp z_tv − z_t,target
    loss = Σ_t w_t nll_t
    ∂loss/∂z_t = w_t (softmax z_t − onehot target_t)

With `chunks` above 1 the logits of one part of each row's tokens exist at a
time, and the gradients of x and E are made in the same pass: nothing is
computed twice, and nothing of (tokens, V) is kept. Token t is in part
t mod (M / chunks), so that a device that holds a slice of a row keeps it.

The product with ∂loss/∂z takes it in the dtype of x, as it takes the weights.
In a pass with gradients a part's logits are kept in that dtype too, and their
softmax is computed in float32, on a Hopper GPU by a kernel of its own; without
gradients they stay in float32.
"""

import functools
from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
import optax

from pallas_kernels import ShardAxes, cross_entropy as kernel, devices
from pallas_kernels.numerics import sum_dtype
from pallas_kernels.sharding import vary_alike
from rebased_jax import blocks


class Tokens(NamedTuple):
  """What is known of each target; no gradient flows through it."""

  nll_BM: Array  # float32
  right_BM: Array  # float32: 1 where the target has the greatest logit


class _Split(NamedTuple):
  """How a device's part was cut out."""

  names: tuple[str, ...]  # of the mesh's axes that split the tokens
  has_whole_rows: bool  # no other axis splits anything


class _Plan(NamedTuple):
  """The static part."""

  chunks: int
  axes: ShardAxes | None


def cross_entropy(
  x_BMD: Array,
  embedding_VD: Array,
  targets_BM: Array,
  weights_BM: Array,
  *,
  chunks: int = 1,
  axes: ShardAxes | None = None,
) -> tuple[Array, Tokens]:
  """Σ w nll, float32, and each token's part.

  Args:
    x_BMD: of `LM.features`.
    embedding_VD: of the head; computed with in the dtype of x.
    targets_BM: integers in [0, V).
    weights_BM: float32. They have no gradient.
    chunks: parts of a row.
    axes: the mesh axes that split batch and tokens.

  Raises:
    ValueError: the parts do not divide the tokens of a row on a device.
  """
  if chunks == 1:
    tokens = _tokens(blocks.logits(x_BMD, embedding_VD), targets_BM)
    fixed = jax.tree.map(jax.lax.stop_gradient, tokens)
    return (weights_BM * tokens.nll_BM).sum(), fixed
  plan = _Plan(chunks, axes)
  arrays = vary_alike(x_BMD, embedding_VD, targets_BM, weights_BM)
  return _chunked(*arrays, plan)


def _tokens(logits_V: Array, targets: Array) -> Tokens:
  nll = optax.softmax_cross_entropy_with_integer_labels(logits_V, targets)
  right = jnp.argmax(logits_V, axis=-1) == targets
  return Tokens(nll, right.astype(jnp.float32))


def _tokens_of_part(logits_V: Array, targets: Array) -> tuple[Tokens, Array]:
  """The same without a gradient, and log Σ exp z."""
  total, best = _total_and_best(logits_V)
  return _known(logits_V, targets, total, best), total


def _known(
  logits_V: Array, targets: Array, total: Array, best: Array
) -> Tokens:
  """Of log Σ exp z and where z is greatest."""
  of_target = jnp.take_along_axis(logits_V, targets[..., None], axis=-1)
  nll = total - of_target[..., 0].astype(total.dtype)
  return Tokens(nll, (best == targets).astype(jnp.float32))


def _total_and_best(logits_V: Array) -> tuple[Array, Array]:
  """log Σ exp z and where z is greatest, over the last axis.

  On a GPU in one reduction, which reads the logits once; elsewhere XLA makes
  slow code of it.
  """
  if devices.platform() != "gpu":
    total = jax.nn.logsumexp(logits_V, axis=-1)
    return total, jnp.argmax(logits_V, axis=-1)
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(x_BMD, embedding_VD, targets_BM, weights_BM, plan: _Plan):
  return _over_mesh(_forward, plan, has_grads=False)(
    x_BMD, embedding_VD.astype(x_BMD.dtype), targets_BM, weights_BM
  )


def _chunked_forward(x_BMD, embedding_VD, targets_BM, weights_BM, plan):
  result, (dx_BMD, dembedding_VD) = _over_mesh(_both, plan, has_grads=True)(
    x_BMD, embedding_VD.astype(x_BMD.dtype), targets_BM, weights_BM
  )
  return result, (dx_BMD, dembedding_VD.astype(embedding_VD.dtype))


def _chunked_backward(plan, grads, cotangents):
  del plan
  scale, _ = cotangents
  dx_BMD, dembedding_VD = jax.tree.map(
    lambda x: (x.astype(scale.dtype) * scale).astype(x.dtype), grads
  )
  return dx_BMD, dembedding_VD, None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _over_mesh(function, plan: _Plan, *, has_grads: bool):
  """The function, of each device's tokens."""
  axes = plan.axes
  if axes is None:
    split = _Split((), has_whole_rows=True)
    return functools.partial(function, chunks=plan.chunks, split=split)
  names = axes.bt_names()
  sizes = jax.sharding.get_abstract_mesh().shape
  alone = axes.are_alone(axes.batch, axes.time)
  split = _Split(names, has_whole_rows=alone)
  rows, whole = axes.bt(), jax.P()
  result = whole, Tokens(rows, rows)
  return jax.shard_map(
    functools.partial(function, chunks=plan.chunks, split=split),
    in_specs=(rows, whole, rows, rows),
    out_specs=(result, (rows, whole)) if has_grads else result,
    # What splits V is the compiler's.
    axis_names=set(sizes) if alone else set(names),
    check_vma=False,
  )


def _forward(x_BMD, embedding_VD, targets_BM, weights_BM, *, chunks, split):
  def part(total, inputs):
    x_BCD, targets_BC, weights_BC = inputs
    logits_BCV = blocks.logits(x_BCD, embedding_VD)
    tokens, _ = _tokens_of_part(logits_BCV, targets_BC)
    return total + (weights_BC * tokens.nll_BM).sum(), tokens

  parts = _parts((x_BMD, targets_BM, weights_BM), chunks)
  zero = jnp.zeros((), sum_dtype(x_BMD.dtype))
  zero, _ = vary_alike(zero, parts)
  total, tokens = jax.lax.scan(part, zero, parts)
  return jax.lax.psum(total, split.names), _whole(tokens)


def _both(x_BMD, embedding_VD, targets_BM, weights_BM, *, chunks, split):
  dtype = sum_dtype(x_BMD.dtype)

  def part(carry, inputs):
    total, dembedding_VD = carry
    x_BCD, targets_BC, weights_BC = inputs
    logits_BCV = blocks.logits(x_BCD, embedding_VD, x_BCD.dtype)
    if split.has_whole_rows and kernel.runs_on(logits_BCV):
      tokens, dlogits_BCV = _by_kernel(logits_BCV, targets_BC, weights_BC)
    else:
      logits_BCV = logits_BCV.astype(dtype)
      tokens, total_BC = _tokens_of_part(logits_BCV, targets_BC)
      dlogits_BCV = _dlogits(logits_BCV, total_BC, targets_BC, weights_BC)
      dlogits_BCV = dlogits_BCV.astype(x_BCD.dtype)
    dx_BCD = jnp.einsum("bcv,vd->bcd", dlogits_BCV, embedding_VD)
    dembedding_VD += jnp.einsum(
      "bcv,bcd->vd",
      dlogits_BCV,
      x_BCD,
      preferred_element_type=dembedding_VD.dtype,
    )
    total += (weights_BC * tokens.nll_BM).sum()
    return (total, dembedding_VD), (tokens, dx_BCD)

  parts = _parts((x_BMD, targets_BM, weights_BM), chunks)
  zeros = jnp.zeros((), dtype), jnp.zeros(embedding_VD.shape, dtype)
  zeros, _ = vary_alike(zeros, parts)
  sums, of_tokens = jax.lax.scan(part, zeros, parts)
  total, dembedding_VD = jax.lax.psum(sums, split.names)
  tokens, dx_BMD = _whole(of_tokens)
  return (total, tokens), (dx_BMD, dembedding_VD)


def _by_kernel(
  logits_BCV: Array, targets_BC: Array, weights_BC: Array
) -> tuple[Tokens, Array]:
  """What is known of each target, and ∂(w nll)/∂z in the dtype of z."""
  from pallas_kernels.cross_entropy import gpu  # takes long to import

  rows = lambda x_BC: x_BC.reshape(-1)
  dlogits_RV, *found = gpu.losses(
    logits_BCV.reshape(-1, logits_BCV.shape[-1]),
    rows(targets_BC.astype(jnp.int32)),
    rows(weights_BC.astype(jnp.float32)),
  )
  top_BC, total_BC, best_BC = (x.reshape(targets_BC.shape) for x in found)
  total_BC = top_BC + jnp.log(total_BC)
  tokens = _known(logits_BCV, targets_BC, total_BC, best_BC)
  return tokens, dlogits_RV.reshape(logits_BCV.shape)


def _dlogits(
  logits_V: Array, total: Array, targets: Array, weights: Array
) -> Array:
  """∂(w nll)/∂z, by log Σ exp z."""
  index_V = jax.lax.broadcasted_iota(
    targets.dtype, logits_V.shape, logits_V.ndim - 1
  )
  is_target_V = index_V == targets[..., None]
  softmax_V = jnp.exp(logits_V - total[..., None])
  excess_V = softmax_V - is_target_V.astype(logits_V.dtype)
  return weights[..., None] * excess_V


def _parts(tree, chunks: int):
  """(B, M, …) → (chunks, B, C, …): token t is in part t mod chunks."""

  def split(x_BM):
    B, M, *rest = x_BM.shape
    if M % chunks:
      raise ValueError(
        f"loss_chunks={chunks}: expected a divisor of the {M} targets of a row "
        "on a device"
      )
    return jnp.moveaxis(x_BM.reshape(B, M // chunks, chunks, *rest), 2, 0)

  return jax.tree.map(split, tree)


def _whole(tree):
  """The inverse of `_parts`."""

  def join(x_NBC):
    x_BCN = jnp.moveaxis(x_NBC, 0, 2)
    B, C, N, *rest = x_BCN.shape
    return x_BCN.reshape(B, C * N, *rest)

  return jax.tree.map(join, tree)
