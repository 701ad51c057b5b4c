"""Softmax cross-entropy of a tied head, a part of the tokens at a time.

    z_t = E x_t,   nll_t = l_t − z_t,target
    l_t = log Σ_v exp z_tv
    loss = Σ_t w_t (nll_t + c l_t²)              c is `z_loss`, usually 0
    ∂loss/∂z_t = w_t (softmax z_t − onehot target_t) + 2 c w_t l_t softmax z_t

With one part, jax differentiates the loss of the whole logits (B, M, V), except
for the product of a bfloat16 x. With more, the logits of one part of each row's
tokens exist at a time. The forward pass makes the gradients of x and E on the
way, so that nothing is computed twice and no array of M · V numbers is kept.
Token t is in part t mod (M / parts): a device that holds a slice of every row
keeps its tokens.

The products with ∂loss/∂z take it in x's dtype, but one part of a float16 x in
float32. With several parts and gradients the logits of a part are kept in x's
dtype too, and their softmax is computed in float32, on a Hopper GPU by one
kernel. Otherwise the logits are float32. The kernel knows no z_loss: XLA adds
its gradient to the kernel's.
"""

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels.arguments import (
  float_array,
  integer_array,
  positive_integer,
)
from pallas_kernels.by_platform import by_platform
from pallas_kernels.compile_once import compile_once, compiled_backward
from pallas_kernels.cross_entropy import xla
from pallas_kernels.cross_entropy.xla import TokenLosses
from pallas_kernels.explicit_mesh import on_any_mesh
from pallas_kernels.numerics import asked_precision, sum_dtype
from pallas_kernels.plain_derivatives import OwnDerivative
from pallas_kernels.sharding import (
  ShardAxes,
  check_axes,
  unsplit_axes,
  vary_alike,
)

# The kernel reads rows in blocks of gpu.BLOCK logits and loads of 16 bytes.
_FEWEST_LOGITS = 1024
_ALIGNED = 8


class _Plan(NamedTuple):
  """The static part of a call."""

  parts: int
  axes: ShardAxes | None
  precision: jax.lax.Precision | None  # of the products
  z_loss: float


class _Split(NamedTuple):
  """How the tokens of one device were cut out."""

  names: tuple[str, ...]  # of the mesh axes that split the tokens
  has_whole_rows: bool  # whether no other axis splits anything, such as V


@on_any_mesh("BMD", ("", TokenLosses("BM", "BM")))
def cross_entropy(
  x: Array,
  embedding: Array,
  targets: Array,
  weights: Array | None = None,
  *,
  parts: int = 1,
  axes: ShardAxes | None = None,
  precision: str | None = None,
  z_loss: float = 0.0,
) -> tuple[Array, TokenLosses]:
  """Compute Σ w · nll of a tied head, nll = −log softmax(x Eᵀ)[target].

  Differentiable in x and the embedding. With several parts the whole logits
  never exist. On a Hopper GPU the loss and the gradient of a part's 16-bit
  logits come from one kernel, if V is a multiple of 8 and at least 1024.

  Args:
    x: (B, M, D), of any float dtype: the features of M tokens a row.
    embedding: E (V, D), of any float dtype; the products use it in x's dtype.
    targets: integers (B, M), each in [0, V). Another one makes the loss NaN,
      unless its weight is 0.
    weights: w (B, M), floats; 0 leaves a token out. They have no gradient.
      None: 1 for every token.
    parts: parts that each row's M tokens are computed in, one after the other:
      the logits take 1/parts of the memory. It divides the tokens of a row on a
      device. Several parts have reverse-mode first derivatives only, and one
      part of a bfloat16 x has no forward mode.
    axes: the axes of the ambient mesh that split batch and tokens; they matter
      for several parts. None: the arrays are whole, or XLA splits them.
    precision: of the products of a float32 x: "default", "high" or "highest".
      None: jax's setting, `jax_default_matmul_precision`.
    z_loss: c; adds Σ w · c · (log Σ exp logits)² to the sum, which keeps the
      logits of a token from drifting away together. A Python number.

  Returns:
    (loss, tokens): the sum, a scalar, and a `TokenLosses` of each token, all
    float32, or float64 for float64 inputs. No gradient flows through tokens,
    and they do not contain the z-loss.

  Raises:
    ValueError: an argument does not fit, the mesh does not fit batch and
      tokens, or `parts` does not divide the tokens of a row on a device. The
      message names the argument.
  """
  x = float_array("x", x, ("B", "M", "D"))
  embedding = float_array(
    "embedding", embedding, ("V", x.shape[-1]), nonempty=True
  )
  targets = integer_array("targets", targets, x.shape[:2])
  if weights is None:
    weights = jnp.ones(x.shape[:2], sum_dtype(x.dtype))
  weights = float_array("weights", weights, x.shape[:2])
  parts = positive_integer("parts", parts)
  check_axes(axes)
  asked = asked_precision(precision, x.dtype)
  is_number = isinstance(z_loss, int | float) and not isinstance(z_loss, bool)
  if not (is_number and 0 <= z_loss < math.inf):
    raise ValueError(f"z_loss={z_loss!r}: expected a finite Python number ≥ 0")
  if parts > 1:
    _check_parts(x, parts, axes)
  # A token that is left out may have any target, and 0 · NaN would be NaN.
  is_outside = xla.is_outside(targets, embedding.shape[0])
  targets = jnp.where(is_outside & (weights == 0), 0, targets)
  if parts == 1:
    if x.dtype == jnp.bfloat16:
      x, embedding = vary_alike(x, embedding)
      logits = compile_once(_narrow_logits, (asked,), x, embedding)
    else:
      logits = xla.logits(x, embedding, precision=asked)
    tokens, log_sum_BM = xla.token_losses_and_log_sums(logits, targets)
    fixed = jax.tree.map(jax.lax.stop_gradient, tokens)
    loss_BM = tokens.nll_BM
    if z_loss:
      loss_BM += z_loss * log_sum_BM**2
    return (weights * loss_BM).sum(), fixed
  arrays = vary_alike(x, embedding, targets, weights)
  plan = _Plan(parts, axes, asked, float(z_loss))
  return compile_once(_in_parts, (plan,), *arrays)


def _check_parts(x: Array, parts: int, axes: ShardAxes | None) -> None:
  """Raise ValueError if parts do not divide a row's tokens on a device."""
  on_device = x.shape[1]
  if axes is not None:
    axes.check(x.shape[0], None, x.shape[1])
    on_device //= axes.devices(axes.time)
  if on_device % parts:
    raise ValueError(
      f"parts={parts}: expected a divisor of the {on_device} targets of a row "
      "on a device"
    )


@functools.partial(OwnDerivative, static=(0,))
def _narrow_logits(precision, x_BMD, embedding_VD):
  """Return the logits (B, M, V) of a bfloat16 x, in float32.

  jax would multiply their gradient in float32. Ours takes it in bfloat16, which
  is half of the bytes, and several times faster on a tensor core. float16 has
  too small a range for the gradient of a mean loss.
  """
  return xla.logits(x_BMD, embedding_VD, precision=precision)


def _narrow_forward(precision, x_BMD, embedding_VD):
  return _narrow_logits(precision, x_BMD, embedding_VD), (x_BMD, embedding_VD)


def _narrow_backward(precision, kept, dlogits_BMV):
  x_BMD, embedding_VD = kept
  return xla.logits_backward(
    x_BMD, embedding_VD, dlogits_BMV.astype(x_BMD.dtype), precision=precision
  )


_narrow_logits.defvjp(_narrow_forward, compiled_backward(_narrow_backward))


def has_kernel(logits_V: Array) -> bool:
  """Whether `cross_entropy` runs its Hopper kernel for logits (…, V)."""
  V = logits_V.shape[-1]
  return (
    V >= _FEWEST_LOGITS
    and V % _ALIGNED == 0
    and devices.takes_row_kernel(logits_V)
    and devices.can_import_kernels("pallas_kernels.cross_entropy.gpu")
  )


@functools.partial(OwnDerivative, static=(0,))
def _in_parts(plan: _Plan, x_BMD, embedding_VD, targets_BM, weights_BM):
  return _over_mesh(_losses, plan, has_grads=False)(
    x_BMD, embedding_VD.astype(x_BMD.dtype), targets_BM, weights_BM
  )


def _in_parts_forward(plan, x_BMD, embedding_VD, targets_BM, weights_BM):
  run = _over_mesh(_losses_and_gradients, plan, has_grads=True)
  result, (dx_BMD, dembedding_VD) = run(
    x_BMD, embedding_VD.astype(x_BMD.dtype), targets_BM, weights_BM
  )
  return result, (dx_BMD, dembedding_VD.astype(embedding_VD.dtype))


def _in_parts_backward(plan, grads, cotangents):
  del plan
  scale, _ = cotangents
  dx_BMD, dembedding_VD = jax.tree.map(
    lambda x: (x.astype(scale.dtype) * scale).astype(x.dtype), grads
  )
  return dx_BMD, dembedding_VD, None, None


_in_parts.defvjp(_in_parts_forward, _in_parts_backward)


def _over_mesh(
  function: Callable[..., Any], plan: _Plan, *, has_grads: bool
) -> Callable[..., Any]:
  """Return the function, run on each device's tokens."""
  axes = plan.axes
  if axes is None:
    split = _Split((), has_whole_rows=not unsplit_axes())
    return functools.partial(function, plan=plan, split=split)
  names = axes.bt_names()
  sizes = jax.sharding.get_abstract_mesh().shape
  alone = axes.are_alone(axes.batch, axes.time)
  split = _Split(names, has_whole_rows=alone)
  rows, whole = axes.bt(), jax.P()
  result = whole, TokenLosses(rows, rows)
  return jax.shard_map(
    functools.partial(function, plan=plan, split=split),
    in_specs=(rows, whole, rows, rows),
    out_specs=(result, (rows, whole)) if has_grads else result,
    # Other axes may split V; they are left to XLA.
    axis_names=set(sizes) if alone else set(names),
    check_vma=False,
  )


def _losses(x_BMD, embedding_VD, targets_BM, weights_BM, *, plan, split):
  """Return (loss, tokens), the sum over all devices."""

  def part(total, inputs):
    x_BCD, targets_BC, weights_BC = inputs
    logits_BCV = xla.logits(x_BCD, embedding_VD, precision=plan.precision)
    tokens, log_sum_BC = xla.token_losses_and_log_sums(logits_BCV, targets_BC)
    loss_BC = tokens.nll_BM
    if plan.z_loss:
      loss_BC += plan.z_loss * log_sum_BC**2
    return total + (weights_BC * loss_BC).sum(), tokens

  inputs = _split_tokens((x_BMD, targets_BM, weights_BM), plan.parts)
  zero = jnp.zeros((), sum_dtype(x_BMD.dtype))
  zero, _ = vary_alike(zero, inputs)
  total, tokens = jax.lax.scan(part, zero, inputs)
  return jax.lax.psum(total, split.names), _join_tokens(tokens)


def _losses_and_gradients(
  x_BMD, embedding_VD, targets_BM, weights_BM, *, plan, split
):
  """Return `_losses`, and (dx, dE) of the sum; dE in the sums' dtype."""
  dtype = sum_dtype(x_BMD.dtype)

  def part(carry, inputs):
    total, dembedding_VD = carry
    x_BCD, targets_BC, weights_BC = inputs
    logits_BCV = xla.logits(
      x_BCD, embedding_VD, x_BCD.dtype, precision=plan.precision
    )
    if split.has_whole_rows and has_kernel(logits_BCV):
      tokens, dlogits_BCV = by_platform(
        devices.kernels_of("gpu"),
        _by_kernel,
        xla.losses_and_gradient,
        logits_BCV,
        targets_BC,
        weights_BC,
      )
    else:
      tokens, dlogits_BCV = xla.losses_and_gradient(
        logits_BCV, targets_BC, weights_BC
      )
    loss_BC = tokens.nll_BM
    if plan.z_loss:
      log_sum_BC = xla.log_sums_of(tokens, logits_BCV, targets_BC)
      loss_BC += plan.z_loss * log_sum_BC**2
      dlogits_BCV = xla.add_z_loss_gradient(
        dlogits_BCV, plan.z_loss * log_sum_BC, targets_BC, weights_BC
      )
    dx_BCD = jnp.einsum(
      "bcv,vd->bcd", dlogits_BCV, embedding_VD, precision=plan.precision
    )
    dembedding_VD += jnp.einsum(
      "bcv,bcd->vd",
      dlogits_BCV,
      x_BCD,
      precision=plan.precision,
      preferred_element_type=dembedding_VD.dtype,
    )
    total += (weights_BC * loss_BC).sum()
    return (total, dembedding_VD), (tokens, dx_BCD)

  inputs = _split_tokens((x_BMD, targets_BM, weights_BM), plan.parts)
  zeros = jnp.zeros((), dtype), jnp.zeros(embedding_VD.shape, dtype)
  zeros, _ = vary_alike(zeros, inputs)
  sums, of_tokens = jax.lax.scan(part, zeros, inputs)
  total, dembedding_VD = jax.lax.psum(sums, split.names)
  tokens, dx_BMD = _join_tokens(of_tokens)
  return (total, tokens), (dx_BMD, dembedding_VD)


def _by_kernel(
  logits_BCV: Array, targets_BC: Array, weights_BC: Array
) -> tuple[TokenLosses, Array]:
  """Return each token's loss, and ∂(w nll)/∂z in z's dtype."""
  from pallas_kernels.cross_entropy import gpu  # takes long to import

  flat = lambda x_BC: x_BC.reshape(-1)
  dlogits_RV, *found = gpu.losses(
    logits_BCV.reshape(-1, logits_BCV.shape[-1]),
    flat(targets_BC.astype(jnp.int32)),
    flat(weights_BC.astype(jnp.float32)),
  )
  top_BC, total_BC, best_BC = (x.reshape(targets_BC.shape) for x in found)
  log_sum_BC = top_BC + jnp.log(total_BC)
  tokens = xla.losses_from_log_sums(logits_BCV, targets_BC, log_sum_BC, best_BC)
  return tokens, dlogits_RV.reshape(logits_BCV.shape)


def _split_tokens(tree: Any, parts: int) -> Any:
  """Return (parts, B, C, …) arrays of (B, M, …) ones, C = M / parts.

  Token t is in part t mod parts.
  """

  def split(x_BM):
    B, M, *rest = x_BM.shape
    return jnp.moveaxis(x_BM.reshape(B, M // parts, parts, *rest), 2, 0)

  return jax.tree.map(split, tree)


def _join_tokens(tree: Any) -> Any:
  """Return (B, M, …) arrays: the inverse of `_split_tokens`."""

  def join(x_NBC):
    x_BCN = jnp.moveaxis(x_NBC, 0, 2)
    B, C, N, *rest = x_BCN.shape
    return x_BCN.reshape(B, C * N, *rest)

  return jax.tree.map(join, tree)
