"""Polynomial attention: the equations that every implementation computes.

With queries q_t and keys k_s of width F and values v_s of width P, one head is

    s_ts   = scale · q_t·k_s
    sim_ts = c0 + c1 s_ts + c2 s_ts²          for the keys s that t sees, else 0
    o_t    = Σ_s sim_ts v_s / (Σ_s sim_ts + eps)

Token t sees the tokens s ≤ t of the same document. `reference` computes these
equations as they stand, in O(T²). `state.py` has the linear form, O(T), in
which the past is one sum: state_t = Σ_{s≤t} feat(k_s) ⊗ [v_s, 1].

Names of arrays end in their axes: B batch, T query time, S key time, H heads,
F features, P value width, D model width, V vocabulary, M targets of a row.
Leading axes can be left out: x_D is (…, D).

`REBASED` = (0, 0, 1) is the similarity of ReBased (arXiv 2402.10644),

    sim(q, k) = (q·k)² / F.

1/F is the square of the default `scale` of `polynomial_attention`, F^(−1/2). γ
and β act before this operator (`rebased_jax/mixers/rebased.py`): the queries
that arrive here are γ_Q ∘ norm(x W_Q) + β_Q, and the keys likewise.

`BASED` = (1, 1, ½) is the similarity of Based (arXiv 2402.18668), the Taylor
expansion of exp(s) to second order, 1 + s + s²/2.

A worked example of ReBased: F = 2, T = 3 tokens, values of width P = 1.

  >>> q_BTHF = jnp.array([[1.0, 0], [1, 1], [0, 2]]).reshape(1, 3, 1, 2)
  >>> k_BTHF = jnp.array([[1.0, 1], [2, 0], [1, -1]]).reshape(1, 3, 1, 2)
  >>> v_BTHP = jnp.array([1.0, 2, 4]).reshape(1, 3, 1, 1)
  >>> mask_BTS = jnp.tril(jnp.ones((1, 3, 3), bool))

The products q_t·k_s, for s ≤ t, are 1; then 2 and 2; then 2, 0 and −2. Squared
and divided by F = 2 they are the similarities:

  >>> per_product = Coefficients(0, 0, 1 / 2)  # sim = (q·k)²/2
  >>> similarities(q_BTHF, k_BTHF, mask_BTS, per_product)[0, 0]
  Array([[0.5, 0. , 0. ],
         [2. , 2. , 0. ],
         [2. , 0. , 2. ]], dtype=float32)

Each output is the mean of the values, weighted by its row: o_1 = v_1 = 1,
o_2 = (2·1 + 2·2) / 4 = 1.5 and o_3 = (2·1 + 2·4) / 4 = 2.5.

  >>> reference(
  ...   q_BTHF, k_BTHF, v_BTHP, mask_BTS, coefficients=per_product, eps=0.0
  ... ).squeeze()
  Array([1. , 1.5, 2.5], dtype=float32)
"""

import dataclasses

import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels.numerics import sum_dtype, weighted_sum
from pallas_kernels.polynomial.coefficients import Coefficients


def similarity(product: Array, coefficients: Coefficients) -> Array:
  """Compute sim from q·k, elementwise.

  Args:
    product: q·k, of any shape.
    coefficients: c0, scale · c1 and scale² · c2, which `Coefficients.scaled`
      returns. The functions below take the same.
  """
  c0, c1, c2 = dataclasses.astuple(coefficients)
  return c0 + product * (c1 + c2 * product)


def similarities(
  q_BTHF: Array,
  k_BSHF: Array,
  mask_BTS: Array,
  coefficients: Coefficients,
) -> Array:
  """Compute sim_BHTS in float32 or float64; it is 0 where the mask is False."""
  acc = sum_dtype(q_BTHF.dtype)
  product_BHTS = jnp.einsum(
    "bthf,bshf->bhts",
    q_BTHF.astype(acc),
    k_BSHF.astype(acc),
    precision=jax.lax.Precision.HIGHEST,
  )
  return jnp.where(mask_BTS[:, None], similarity(product_BHTS, coefficients), 0)


def reference(
  q_BTHF: Array,
  k_BSHF: Array,
  v_BSHP: Array,
  mask_BTS: Array,
  *,
  coefficients: Coefficients,
  eps: float,
  past: tuple[Array, Array] | None = None,
) -> Array:
  """Compute the equations as they stand, in time and memory O(T·S).

  The function is plain jax: it can be differentiated in forward and in reverse
  mode, any number of times.

  Args:
    q_BTHF: queries. Query t need not be at the position of key t.
    k_BSHF: keys.
    v_BSHP: values.
    mask_BTS: whether query t sees key s.
    coefficients: of q·k itself, as in `similarity`.
    eps: added to Σ sim.
    past: what tokens before the first key add to the two sums, as
      (numerator_BHTP, denominator_BHT); None where there are none.

  Returns:
    o_BTHP, in the dtype of v.
  """
  acc = sum_dtype(q_BTHF.dtype)
  sim_BHTS = similarities(q_BTHF, k_BSHF, mask_BTS, coefficients)
  v_BHSP = jnp.moveaxis(v_BSHP, 2, 1).astype(acc)
  # Σ_s sim_ts v_s, in which a v_s that t does not see may be NaN or infinite.
  num_BHTP = weighted_sum(sim_BHTS, v_BHSP, mask_BTS[:, None])
  z_BHT = sim_BHTS.sum(axis=-1)
  if past is not None:
    past_num_BHTP, past_z_BHT = past
    num_BHTP, z_BHT = num_BHTP + past_num_BHTP, z_BHT + past_z_BHT
  o_BHTP = num_BHTP / (z_BHT + eps)[..., None]
  return jnp.moveaxis(o_BHTP, 1, 2).astype(v_BSHP.dtype)
