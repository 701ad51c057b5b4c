"""What ReBased and Based share: projections around polynomial attention.

    q_t = query(W_q x_t),  k_t = key(W_k x_t),  v_t = W_v x_t     a head each
    y_t = W_o concat_h( Σ_s sim(q_t, k_s) v_s / (Σ_s sim(q_t, k_s) + eps) )

No bias, no gate and no norm behind it; values are floor(D / H) wide.
"""

import abc
import math
from typing import NamedTuple

from flax import nnx
from jax import Array

from pallas_kernels import (
  IMPLEMENTATIONS,
  Coefficients,
  ShardAxes,
  State,
  polynomial_attention,
  polynomial_attention_at,
  polynomial_attention_step,
  polynomial_attention_weights,
  zero_state,
)
from rebased_jax.mixers import base

FEW_QUERIES = 64  # up to here, chosen queries are cheaper one by one


class Shape(NamedTuple):
  """The static sizes of a polynomial mixer."""

  heads: int  # H
  features: int  # F
  value_features: int  # P


class Projections(nnx.Module):
  """W_q, W_k, W_v and W_o, with the split into heads."""

  def __init__(self, shape: Shape, width: int, *, dtype: str, rngs: nnx.Rngs):
    H, F, P = shape
    self.shape = shape
    self.q = base.linear(width, H * F, dtype=dtype, rngs=rngs)
    self.k = base.linear(width, H * F, dtype=dtype, rngs=rngs)
    self.v = base.linear(width, H * P, dtype=dtype, rngs=rngs)
    self.o = base.linear(H * P, width, dtype=dtype, rngs=rngs)

  def out(self, o_HP: Array) -> Array:
    """(…, H, P) → (…, D)."""
    return self.o(o_HP.reshape(*o_HP.shape[:-2], -1))


def split_heads(x: Array, heads: int) -> Array:
  """(…, H·F) → (…, H, F)."""
  return x.reshape(*x.shape[:-1], heads, -1)


class PolynomialMixer(base.Mixer):
  """Abstract: a mixer over `polynomial_attention`.

  A subclass sets the fields, and says what queries and keys are.
  """

  project: Projections
  coefficients: Coefficients
  eps: float
  implementation: str | None

  @abc.abstractmethod
  def query(self, x_D: Array) -> Array:
    """(…, D) → (…, H, F)."""

  @abc.abstractmethod
  def key(self, x_D: Array) -> Array:
    """(…, D) → (…, H, F)."""

  def value(self, x_D: Array) -> Array:
    """(…, D) → (…, H, P)."""
    return split_heads(self.project.v(x_D), self.project.shape.heads)

  def __call__(
    self,
    x_BTD: Array,
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
    query_positions: Array | None = None,
  ) -> Array:
    base.check_rows(self, x_BTD, segment_ids, query_positions=query_positions)
    k_BTHF, v_BTHP = self.key(x_BTD), self.value(x_BTD)
    whole_time = axes is None or axes.time is None
    few = (
      query_positions is not None and query_positions.shape[1] <= FEW_QUERIES
    )
    if few and whole_time and self.implementation is None:
      x_BMD = base.take_positions(x_BTD, query_positions)
      o_BMHP = polynomial_attention_at(
        self.query(x_BMD),
        k_BTHF,
        v_BTHP,
        query_positions,
        coefficients=self.coefficients,
        eps=self.eps,
        segment_ids=segment_ids,
      )
      return self.project.out(o_BMHP)
    o_BTHP = polynomial_attention(
      self.query(x_BTD),
      k_BTHF,
      v_BTHP,
      coefficients=self.coefficients,
      eps=self.eps,
      segment_ids=segment_ids,
      axes=axes,
      implementation=self.implementation,
    )
    B, T, H, P = o_BTHP.shape
    o_BTD = o_BTHP.reshape(B, T, H * P)
    return self.project.o(base.take_positions(o_BTD, query_positions))

  def init_state(self, batch: int) -> State:
    H, F, P = self.project.shape
    return zero_state(
      batch,
      H,
      F,
      P,
      coefficients=self.coefficients,
      dtype=self.project.q.dtype,
    )

  def prefill(
    self,
    x_BTD: Array,
    state: State,
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
  ) -> tuple[Array, State]:
    base.check_rows(self, x_BTD, segment_ids, state=state)
    o_BTHP, state = polynomial_attention(
      self.query(x_BTD),
      self.key(x_BTD),
      self.value(x_BTD),
      coefficients=self.coefficients,
      eps=self.eps,
      segment_ids=segment_ids,
      initial_state=state,
      return_state=True,
      axes=axes,
      implementation=self.implementation,
    )
    return self.project.out(o_BTHP), state

  def step(self, x_BD: Array, state: State) -> tuple[Array, State]:
    base.check_token(self, x_BD, state)
    o_BHP, state = polynomial_attention_step(
      state,
      self.query(x_BD),
      self.key(x_BD),
      self.value(x_BD),
      coefficients=self.coefficients,
      eps=self.eps,
    )
    return self.project.out(o_BHP), state

  def attention_matrix(self, x_BTD: Array) -> Array:
    """A_BHTT, the normalised weights Σ_s A_ts ≤ 1; quadratic, to look at."""
    return polynomial_attention_weights(
      self.query(x_BTD),
      self.key(x_BTD),
      coefficients=self.coefficients,
      eps=self.eps,
    )


def check_sizes(config: object, width: int) -> Shape:
  """The shape of a config at a width; raises ValueError where none fits."""
  base.positive(config, "heads", "features", "value_features")
  P = config.value_features or width // config.heads
  if P == 0:
    raise ValueError(
      f"{type(config).__name__}.heads={config.heads} at width {width}: "
      "expected heads ≤ width, for a value width of floor(width / heads) ≥ 1"
    )
  return Shape(config.heads, config.features, P)


def check_config(config: object) -> None:
  """Raises ValueError where a field that the two configs share is wrong."""
  base.positive(config, "heads", "features", "value_features")
  name = type(config).__name__
  if not 0 <= config.eps < math.inf:
    raise ValueError(f"{name}.eps={config.eps!r}: expected a number ≥ 0")
  if config.implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f"{name}.implementation={config.implementation!r}: expected None or one "
      f"of {IMPLEMENTATIONS}"
    )
