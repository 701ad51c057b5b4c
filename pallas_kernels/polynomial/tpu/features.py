"""Features of queries and keys in the TPU kernels, and their cotangents.

The features are those of `state.py`, with tokens along lanes: (E, C). They are
made in groups of rows (`Call.groups`), which are used at once, so that all of
them are never held together.
"""

from collections.abc import Iterator

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels.polynomial.tpu.call import ONE_ROWS, Call, FeatureGroup


def features(
  x_FC: Array, call: Call, *, weighted: bool
) -> Iterator[tuple[FeatureGroup, Array]]:
  """Make the features of x, group by group.

  Args:
    x_FC: queries or keys, float32.
    call: the launch.
    weighted: whether to multiply by the weights in sim / c2 (φ_w), as queries
      are.

  Yields:
    (group, features of the group), the features in the call's dtype.
  """
  for group in call.groups():
    rows = []
    for shift in group.shifts:
      weight = call.weight(shift) if weighted else 1.0
      other_FC = roll(x_FC, shift)
      rows.append(x_FC * (other_FC * weight if weight != 1 else other_FC))
    if group.affine:
      c1, c0 = (call.c1, call.c0) if weighted else (1.0, 1.0)
      rows += [x_FC * c1, _one_rows(x_FC) * c0]
    yield group, jnp.concatenate(rows).astype(call.dtype)


def feature_cotangent(
  u_EC: Array, group: FeatureGroup, x_FC: Array, call: Call, *, weighted: bool
) -> tuple[Array, Array]:
  """Compute the cotangent of x from that of a group's products, in two terms.

  Args:
    u_EC: the cotangent of the group's features.
    group: the group.
    x_FC: queries or keys, float32.
    call: the launch.
    weighted: as in `features`.

  Returns:
    (Σ_r u_r ∘ roll(x, r), Σ_r roll(u_r ∘ x, −r)). The cotangent is their sum.
    The first also gives u·features = x·(first term).
  """
  first_FC = second_FC = jnp.zeros_like(x_FC)
  for i, shift in enumerate(group.shifts):
    u_FC = u_EC[i * call.F : (i + 1) * call.F]
    if weighted and call.weight(shift) != 1:
      u_FC = u_FC * call.weight(shift)
    first_FC += u_FC * roll(x_FC, shift)
    second_FC += roll(u_FC * x_FC, -shift)
  return first_FC, second_FC


def roll(x: Array, shift: int) -> Array:
  """Roll the rows: row i of the result is row i + shift of x, cyclically."""
  shift %= x.shape[0]
  return x if shift == 0 else jnp.concatenate([x[shift:], x[:shift]])


def extend(x_FC: Array, one_1C: Array | None, call: Call) -> Array:
  """Return x̃ (G, C): x, and the rows of the 1 where sim is affine.

  Args:
    x_FC: queries or keys.
    one_1C: the row of the 1, which may be 0 for some tokens; None for ones.
    call: the launch.
  """
  if not call.affine:
    return x_FC
  return jnp.concatenate([x_FC, _one_rows(x_FC, one_1C)])


def _one_rows(x_FC: Array, one_1C: Array | None = None) -> Array:
  """Return `ONE_ROWS` rows of x's dtype: the 1 first, then zeros."""
  C = x_FC.shape[1]
  first = jax.lax.broadcasted_iota(jnp.int32, (ONE_ROWS, C), 0) == 0
  one = 1.0 if one_1C is None else one_1C
  return jnp.where(first, one, 0.0).astype(x_FC.dtype)


def weigh_denominator(kk_GG: Array, call: Call) -> Array:
  """Return W ∘ KK, with W of `state.denominator_weights` divided by c2."""
  if not call.affine:
    return kk_GG
  row, column = (
    jax.lax.broadcasted_iota(jnp.int32, kk_GG.shape, axis) for axis in (0, 1)
  )
  both_x = (row < call.F) & (column < call.F)
  x_and_one = (jnp.minimum(row, column) < call.F) & (
    jnp.maximum(row, column) == call.F
  )
  w_GG = jnp.where(x_and_one, call.c1 / 2, jnp.where(both_x, 1.0, 0.0))
  both_one = (row == call.F) & (column == call.F)
  return kk_GG * jnp.where(both_one, call.c0, w_GG)
