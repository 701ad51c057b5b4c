"""The linear form of polynomial attention: features and the recurrent state.

sim is an inner product of features of q and of k, so that the sums over the
keys s of `spec.py` need no pair (t, s):

    sim_ts           = Σ_e w_e φ_e(q_t) φ_e(k_s)
    Σ_s sim_ts v_s   = (w ∘ φ(q_t))ᵀ KV        KV = Σ_s φ(k_s) v_sᵀ
    Σ_s sim_ts       = q̃_tᵀ (W ∘ KK) q̃_t       KK = Σ_s k̃_s k̃_sᵀ

The recurrent `State` is (KV, KK): its size does not depend on the length.

φ has E features. (q·k)² needs each product x_i x_j once. They are taken
cyclically, in blocks r = 0 … F//2 that are all F wide:

    block r of φ(x) is x_i x_{i+r mod F}, i = 0 … F−1
    (q·k)² = Σ_r w_r Σ_i (q_i q_{i+r}) (k_i k_{i+r}),   w = 1, 2, …, 2

The last w is 1 instead of 2 where F is even, because block r = F/2 holds each
product twice. Where c1 ≠ 0, x follows; where c0 ≠ 0, a 1 follows.

k̃ is k, followed by a 1 where c0 or c1 is not 0; it has G numbers. The
denominator is taken from KK, which is float32, and not from features. Kernels
round features to bfloat16, and the denominator would be wrong by several
percent where keys are alike.
"""

import dataclasses
from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from pallas_kernels.numerics import sum_dtype
from pallas_kernels.polynomial.coefficients import REBASED, Coefficients


class State(NamedTuple):
  """The recurrent state: all that later tokens need of a document's past.

  The arrays are float32, or float64 for float64 inputs.

  Attributes:
    kv_BHEP: KV = Σ_s φ(k_s) v_sᵀ, the sums of the numerator.
    kk_BHGG: KK = Σ_s k̃_s k̃_sᵀ, the sums of the denominator.
  """

  kv_BHEP: Array
  kk_BHGG: Array


class StateProducts(NamedTuple):
  """How products of features with a state are computed.

  Attributes:
    precision: of the products for 16-bit queries, keys and values. Wider ones
      always have HIGHEST.
    time_last: whether the features of T tokens are laid out (E, T), which is
      faster on GPUs, or (T, E).
  """

  precision: jax.lax.Precision | jax.lax.DotAlgorithmPreset
  time_last: bool

  def precision_of(
    self, dtype: jax.typing.DTypeLike
  ) -> jax.lax.Precision | jax.lax.DotAlgorithmPreset:
    """Return the precision for queries, keys and values of this dtype."""
    wide = jnp.dtype(dtype).itemsize > 2
    return jax.lax.Precision.HIGHEST if wide else self.precision


EXACT = StateProducts(jax.lax.Precision.HIGHEST, time_last=False)
# Operands in two parts of bfloat16, 16 bits in all: a product of two bfloat16
# numbers, which a feature is, is kept whole.
IN_PARTS = StateProducts(
  jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3, time_last=True
)


def state_widths(F: int, coefficients: Coefficients) -> tuple[int, int]:
  """Return (E, G): the number of features, and the width of k̃."""
  c0, c1, c2 = dataclasses.astuple(coefficients)
  E = (c2 != 0) * F * (F // 2 + 1) + (c1 != 0) * F + (c0 != 0)
  return E, F + coefficients.affine


def zero_state(
  batch: int,
  heads: int,
  features: int,
  value_features: int,
  *,
  coefficients: Coefficients = REBASED,
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> State:
  """Make the state before the first token of a document.

  Args:
    batch: B, the number of rows.
    heads: H.
    features: F, the width of a head's queries and keys.
    value_features: P, the width of a head's values.
    coefficients: `REBASED` or `BASED`, or your own.
    dtype: of q, k and v. The state is float64 for float64, else float32.

  Returns:
    A `State` of zeros.
  """
  E, G = state_widths(features, coefficients)
  acc = sum_dtype(dtype)
  return State(
    jnp.zeros((batch, heads, E, value_features), acc),
    jnp.zeros((batch, heads, G, G), acc),
  )


def feature_weights(F: int, coefficients: Coefficients) -> np.ndarray:
  """Return w (E,): the weight in sim of each feature of `features`."""
  c0, c1, c2 = dataclasses.astuple(coefficients)
  blocks = np.full(F // 2 + 1, 2.0)
  blocks[0] = 1
  if F % 2 == 0:
    blocks[-1] = 1
  terms = [(c2, c2 * np.repeat(blocks, F)), (c1, np.full(F, c1)), (c0, [c0])]
  return np.concatenate([w for c, w in terms if c != 0])


def features(x: Array, coefficients: Coefficients, *, axis: int = -1) -> Array:
  """Compute φ(x): the axis of x has F numbers and becomes one of E."""
  F = x.shape[axis]
  terms = []
  if coefficients.c2 != 0:
    terms += [x * jnp.roll(x, -r, axis=axis) for r in range(F // 2 + 1)]
  if coefficients.c1 != 0:
    terms.append(x)
  if coefficients.c0 != 0:
    terms.append(jnp.ones_like(jax.lax.slice_in_dim(x, 0, 1, axis=axis)))
  return jnp.concatenate(terms, axis=axis)


def extend(x: Array, coefficients: Coefficients) -> Array:
  """Return x̃: x (…, F) → (…, G), with a 1 appended where c0 or c1 is not 0."""
  if not coefficients.affine:
    return x
  return jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)


def denominator_weights(F: int, coefficients: Coefficients) -> np.ndarray:
  """Return W (G, G), with which Σ_s sim_ts = q̃_tᵀ (W ∘ KK) q̃_t."""
  c0, c1, c2 = dataclasses.astuple(coefficients)
  G = F + coefficients.affine
  w_GG = np.full((G, G), c2)
  if coefficients.affine:
    w_GG[F, :] = w_GG[:, F] = c1 / 2
    w_GG[F, F] = c0
  return w_GG


def query_state(
  q_BHTF: Array,
  state: State,
  coefficients: Coefficients,
  products: StateProducts = EXACT,
) -> tuple[Array, Array]:
  """Compute what the tokens of a state add to the two sums of each query.

  The products are taken in the state's dtype, whatever the dtype of q. With
  features rounded to bfloat16, the two sums would not agree where every q·k is
  near 0, as may be for a past of few tokens. o would then be no mean of values.

  Args:
    q_BHTF: queries.
    state: the recurrent state before them.
    coefficients: with the scale folded in.
    products: how the products are computed.

  Returns:
    (numerator_BHTP, denominator_BHT): Σ_s sim_ts v_s and Σ_s sim_ts.
  """
  F, acc = q_BHTF.shape[-1], state.kv_BHEP.dtype
  precision = products.precision_of(q_BHTF.dtype)
  w_E = jnp.asarray(feature_weights(F, coefficients), acc)
  if products.time_last:
    q_BHFT = q_BHTF.swapaxes(2, 3).astype(acc)
    phi_BHET = features(q_BHFT, coefficients, axis=2)
    wkv_BHEP = w_E[None, None, :, None] * state.kv_BHEP
    num_BHTP = jnp.einsum(
      "bhet,bhep->bhtp", phi_BHET, wkv_BHEP, precision=precision
    )
  else:
    phi_BHTE = (
      features(q_BHTF.astype(acc), coefficients) * w_E[None, None, None]
    )
    num_BHTP = jnp.einsum(
      "bhte,bhep->bhtp", phi_BHTE, state.kv_BHEP, precision=precision
    )
  q_BHTG = extend(q_BHTF.astype(acc), coefficients)
  w_11GG = jnp.asarray(denominator_weights(F, coefficients), acc)[None, None]
  wkk_BHGG = w_11GG * state.kk_BHGG
  z_BHT = jnp.einsum(
    "bhtg,bhgj,bhtj->bht", q_BHTG, wkk_BHGG, q_BHTG, precision=precision
  )
  return num_BHTP, z_BHT


def key_state(
  k_BHTF: Array,
  v_BHTP: Array,
  coefficients: Coefficients,
  keep_B1T: Array | None = None,
  products: StateProducts = EXACT,
) -> State:
  """Sum the state of these tokens alone.

  Args:
    k_BHTF: keys.
    v_BHTP: values.
    coefficients: with the scale folded in.
    keep_B1T: which tokens count; None counts all.
    products: how the products are computed.
  """
  acc = sum_dtype(k_BHTF.dtype)
  precision = products.precision_of(k_BHTF.dtype)
  if products.time_last:
    k_BHFT = k_BHTF.swapaxes(2, 3).astype(acc)
    phi_BHET = features(k_BHFT, coefficients, axis=2)
    phi_BHTE = phi_BHET.swapaxes(2, 3)
  else:
    phi_BHTE = features(k_BHTF.astype(acc), coefficients)
  k_BHTG = extend(k_BHTF.astype(acc), coefficients)
  if keep_B1T is not None:
    phi_BHTE, v_BHTP, k_BHTG = (
      jnp.where(keep_B1T[..., None], x, 0) for x in (phi_BHTE, v_BHTP, k_BHTG)
    )
  kv_BHEP = jnp.einsum(
    "bhte,bhtp->bhep", phi_BHTE, v_BHTP.astype(acc), precision=precision
  )
  kk_BHGG = jnp.einsum("bhtg,bhtj->bhgj", k_BHTG, k_BHTG, precision=precision)
  return State(kv_BHEP, kk_BHGG)


def restore_antisymmetric_part(
  state: State, initial: State | None, joined_B: Array | None = None
) -> State:
  """Add back the antisymmetric part of the initial `kk`.

  The GPU and TPU kernels keep the symmetric part only. Sums over tokens are
  symmetric, so that only a state built by hand, or a cotangent, has another.

  Args:
    state: the kernels' final state, of which `kk` is symmetric.
    initial: the state that the kernels started from; None for zeros.
    joined_B: which rows are one document from the first token to the last, so
      that their final state contains the initial one; None for all.
  """
  if initial is None:
    return state
  skew_BHGG = (initial.kk_BHGG - initial.kk_BHGG.swapaxes(2, 3)) / 2
  if joined_B is not None:
    skew_BHGG = jnp.where(joined_B[:, None, None, None], skew_BHGG, 0)
  return state._replace(kk_BHGG=state.kk_BHGG + skew_BHGG)
