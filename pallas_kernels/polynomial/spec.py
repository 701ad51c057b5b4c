"""Polynomial attention: the equations that every implementation computes.

    s_ts   = scale · q_t·k_s
    sim_ts = c0 + c1 s_ts + c2 s_ts²     for s ≤ t of t's document, else 0
    o_t    = Σ_s sim_ts v_s / (Σ_s sim_ts + eps)

`REBASED` = (0, 0, 1) is the squared kernel of arXiv 2402.10644 (there q and k
are γ·norm(x) + β already); `BASED` = (1, 1, ½) is the second-order Taylor
expansion of exp of arXiv 2402.18668.

In linear time the sums over s are a state. sim is an inner product of
features, and q_t·k_s squared needs only its distinct products. They are taken
cyclically: block r holds x_i x_{i+r mod F}, for r = 0 … F//2, so that every
block is F wide:

    (q·k)² = Σ_r w_r Σ_i (q_i q_{i+r}) (k_i k_{i+r}),  w = 1, 2, …, 2

with a last weight of 1 instead of 2 where F is even (its block r = F/2 meets
each pair twice). With c1 or c0, the features go on with x and with 1.
"""

import dataclasses
from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from pallas_kernels.numerics import product_precision, sum_dtype


@dataclasses.dataclass(frozen=True)
class Coefficients:
  """sim = c0 + c1·s + c2·s²; static numbers."""

  c0: float
  c1: float
  c2: float

  def __post_init__(self):
    for name in ("c0", "c1", "c2"):
      value = getattr(self, name)
      if not np.isfinite(value):
        raise ValueError(
          f"Coefficients.{name}={value}: expected a finite number"
        )
    if self.c0 == self.c1 == self.c2 == 0:
      raise ValueError("Coefficients: all three are 0, so sim would be 0")

  def scaled(self, scale: float) -> "Coefficients":
    """The coefficients of the polynomial in q·k, with `scale` folded in."""
    return Coefficients(self.c0, self.c1 * scale, self.c2 * scale * scale)

  @property
  def affine(self) -> bool:
    """Whether a term below the square is present."""
    return self.c0 != 0 or self.c1 != 0


REBASED = Coefficients(0.0, 0.0, 1.0)
BASED = Coefficients(1.0, 1.0, 0.5)


class State(NamedTuple):
  """What one document's past tokens are to later ones.

  The arrays are float32; those of float64 inputs are float64.

  kv_BHEP: Σ_s features(k_s) v_sᵀ, the sums of the numerator.
  kk_BHGG: Σ_s k̃_s k̃_sᵀ, those of the denominator; k̃ is k, followed by a
    1 where the coefficients have a term below the square.
  """

  kv_BHEP: Array
  kk_BHGG: Array


def sizes(F: int, coefficients: Coefficients) -> tuple[int, int]:
  """(E, G): how many features, and the width of k̃."""
  return weights_E(F, coefficients).size, F + coefficients.affine


def zero_state(
  batch: int,
  heads: int,
  features: int,
  value_features: int,
  *,
  coefficients: Coefficients = REBASED,
  dtype=jnp.float32,
) -> State:
  """The state before the first token of a document."""
  E, G = sizes(features, coefficients)
  acc = sum_dtype(dtype)
  return State(
    jnp.zeros((batch, heads, E, value_features), acc),
    jnp.zeros((batch, heads, G, G), acc),
  )


def weights_E(F: int, coefficients: Coefficients) -> np.ndarray:
  """The weight of each feature in sim."""
  c0, c1, c2 = dataclasses.astuple(coefficients)
  blocks = np.full(F // 2 + 1, 2.0)
  blocks[0] = 1
  if F % 2 == 0:
    blocks[-1] = 1
  terms = [(c2, c2 * np.repeat(blocks, F)), (c1, np.full(F, c1)), (c0, [c0])]
  return np.concatenate([w for c, w in terms if c != 0])


def features(x: Array, coefficients: Coefficients) -> Array:
  """x (…, F) → (…, E): the products that sim is an inner product of."""
  F = x.shape[-1]
  terms = []
  if coefficients.c2 != 0:
    terms += [x * jnp.roll(x, -r, axis=-1) for r in range(F // 2 + 1)]
  if coefficients.c1 != 0:
    terms.append(x)
  if coefficients.c0 != 0:
    terms.append(jnp.ones_like(x[..., :1]))
  return jnp.concatenate(terms, axis=-1)


def extend(x: Array, coefficients: Coefficients) -> Array:
  """x (…, F) → x̃ (…, G)."""
  if not coefficients.affine:
    return x
  return jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)


def weights_GG(F: int, coefficients: Coefficients) -> np.ndarray:
  """W with Σ_s sim_ts = q̃ᵀ (W ∘ Σ k̃ k̃ᵀ) q̃."""
  c0, c1, c2 = dataclasses.astuple(coefficients)
  G = F + coefficients.affine
  w_GG = np.full((G, G), c2)
  if coefficients.affine:
    w_GG[F, :] = w_GG[:, F] = c1 / 2
    w_GG[F, F] = c0
  return w_GG


def polynomial(s: Array, coefficients: Coefficients) -> Array:
  """sim of q·k; `coefficients` have the scale folded in."""
  c0, c1, c2 = dataclasses.astuple(coefficients)
  return c0 + s * (c1 + c2 * s)


def derivative(s: Array, coefficients: Coefficients) -> Array:
  """d sim / d (q·k)."""
  return coefficients.c1 + 2 * coefficients.c2 * s


def with_skew(
  state: State, outer: State | None, joined_B: Array | None = None
) -> State:
  """The state with the antisymmetric part of KK of the one that it began from.

  No sum over tokens has one. `joined_B` says which rows went on from `outer`;
  None: all.
  """
  if outer is None:
    return state
  skew_BHGG = (outer.kk_BHGG - outer.kk_BHGG.swapaxes(2, 3)) / 2
  if joined_B is not None:
    skew_BHGG = jnp.where(joined_B[:, None, None, None], skew_BHGG, 0)
  return state._replace(kk_BHGG=state.kk_BHGG + skew_BHGG)


def weights_BHTS(
  q_BTHF: Array,
  k_BSHF: Array,
  mask_BTS: Array,
  coefficients: Coefficients,
) -> Array:
  """sim, in the accumulator's dtype; 0 where the mask is False."""
  acc = sum_dtype(q_BTHF.dtype)
  s_BHTS = jnp.einsum(
    "bthf,bshf->bhts",
    q_BTHF.astype(acc),
    k_BSHF.astype(acc),
    precision=jax.lax.Precision.HIGHEST,
  )
  return jnp.where(mask_BTS[:, None], polynomial(s_BHTS, coefficients), 0)


def contract(w_ts: Array, x_s: Array, mask_ts: Array | None) -> Array:
  """Σ_s w_ts x_s over masked weights; (…, t, s), (…, s, p) → (…, t, p).

  A weight of 0 does not stop an Inf or NaN in x_s. Where there is a mask of
  documents, such an x_s is kept from every row t whose mask leaves it out, and
  makes NaN of every other.
  """
  einsum = lambda a, b: jnp.einsum(
    "...ts,...sp->...tp",
    a,
    b,
    precision=product_precision(b.dtype),
    preferred_element_type=sum_dtype(b.dtype),
  )
  if mask_ts is None:
    return einsum(w_ts, x_s)
  finite_s = jnp.isfinite(x_s).all(axis=-1)
  y_tp = einsum(w_ts, jnp.where(finite_s[..., None], x_s, 0))
  spoilt_t = (mask_ts & ~finite_s[..., None, :]).any(axis=-1)
  return jnp.where(spoilt_t[..., None], jnp.nan, y_tp)


def reference(
  q_BTHF: Array,
  k_BSHF: Array,
  v_BSHP: Array,
  mask_BTS: Array,
  *,
  coefficients: Coefficients,
  eps: float,
  initial_state: State | None = None,
  first_BT: Array | None = None,
) -> Array:
  """The equations as they stand, quadratic in time: o_BTHP.

  The mask says which s a query at t sees, so queries may stand at any chosen
  positions. `first_BT` marks the queries of token 0's document, which the
  initial state belongs to (None: all). Plain jax, differentiable in forward
  and reverse mode, any number of times.
  """
  acc = sum_dtype(q_BTHF.dtype)
  sim_BHTS = weights_BHTS(q_BTHF, k_BSHF, mask_BTS, coefficients)
  v_BHSP = jnp.moveaxis(v_BSHP, 2, 1).astype(acc)
  num_BHTP = contract(sim_BHTS, v_BHSP, mask_BTS[:, None])
  z_BHT = sim_BHTS.sum(axis=-1)
  if initial_state is not None:
    q_BHTF = jnp.moveaxis(q_BTHF, 2, 1).astype(acc)
    past_num, past_z = query_state(q_BHTF, initial_state, coefficients)
    if first_BT is not None:
      past_num = jnp.where(first_BT[:, None, :, None], past_num, 0)
      past_z = jnp.where(first_BT[:, None], past_z, 0)
    num_BHTP, z_BHT = num_BHTP + past_num, z_BHT + past_z
  o_BHTP = num_BHTP / (z_BHT + eps)[..., None]
  return jnp.moveaxis(o_BHTP, 1, 2).astype(v_BSHP.dtype)


def query_state(
  q_BHTF: Array, state: State, coefficients: Coefficients
) -> tuple[Array, Array]:
  """(numerator_BHTP, denominator_BHT) that the state adds for each query.

  In the accumulator's precision whatever q's dtype: with features rounded to
  bfloat16 the two would not cancel where q·k is near 0, as they do not for a
  past of few tokens, and o would not be a mean of values.
  """
  F = q_BHTF.shape[-1]
  acc, exact = state.kv_BHEP.dtype, jax.lax.Precision.HIGHEST
  w_111E = jnp.asarray(weights_E(F, coefficients), acc)[None, None, None]
  phi_BHTE = features(q_BHTF.astype(acc), coefficients) * w_111E
  num_BHTP = jnp.einsum(
    "bhte,bhep->bhtp",
    phi_BHTE,
    state.kv_BHEP,
    precision=exact,
  )
  q_BHTG = extend(q_BHTF.astype(acc), coefficients)
  w_11GG = jnp.asarray(weights_GG(F, coefficients), acc)[None, None]
  wkk_BHGG = w_11GG * state.kk_BHGG
  z_BHT = jnp.einsum(
    "bhtg,bhgj,bhtj->bht", q_BHTG, wkk_BHGG, q_BHTG, precision=exact
  )
  return num_BHTP, z_BHT


def key_state(
  k_BHTF: Array,
  v_BHTP: Array,
  coefficients: Coefficients,
  keep_B1T: Array | None = None,
) -> State:
  """The state of these tokens alone, or of those that `keep` marks."""
  acc, exact = sum_dtype(k_BHTF.dtype), jax.lax.Precision.HIGHEST
  phi_BHTE = features(k_BHTF.astype(acc), coefficients)
  k_BHTG = extend(k_BHTF.astype(acc), coefficients)
  if keep_B1T is not None:
    phi_BHTE, v_BHTP, k_BHTG = (
      jnp.where(keep_B1T[..., None], x, 0) for x in (phi_BHTE, v_BHTP, k_BHTG)
    )
  kv_BHEP = jnp.einsum(
    "bhte,bhtp->bhep",
    phi_BHTE,
    v_BHTP.astype(acc),
    precision=exact,
  )
  kk_BHGG = jnp.einsum("bhtg,bhtj->bhgj", k_BHTG, k_BHTG, precision=exact)
  return State(kv_BHEP, kk_BHGG)
