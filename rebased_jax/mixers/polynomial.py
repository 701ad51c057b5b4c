"""The part that ReBased and Based share: projections around the operator.

    q_t = query(x_t),  k_s = key(x_s),  v_s = x_s W_V          for each head
    o_t = Σ_s sim(q_t, k_s) v_s / (Σ_s sim(q_t, k_s) + eps)    over s ≤ t
    y_t = concat_heads(o_t) W_O

`pallas_kernels.polynomial_attention` computes o. The projections have no bias,
and no gate or norm follows the operator, as in the paper's code.
"""

import abc
from collections.abc import Callable
import functools
from typing import ClassVar
import warnings

from flax import nnx
from jax import Array

from pallas_kernels import (
  Coefficients,
  ShardAxes,
  State,
  polynomial_attention,
  polynomial_attention_at,
  polynomial_attention_step,
  polynomial_attention_weights,
  zero_state,
)
from pallas_kernels.polynomial import (
  PositionCall,
  expected_form,
  is_cheaper_alone,
)
from rebased_jax.argument_names import explain_unknown_names
from rebased_jax.config_checks import DType, Precision
from rebased_jax.linear import Linear, linear
from rebased_jax.mixer_configs import OFFICIAL_EPS, HeadShape, PolynomialConfig
from rebased_jax.mixers.base import Mixer, take_positions


class Projections(nnx.Module):
  """W_Q, W_K, W_V and W_O.

  Parameters: {q,k}/kernel (D, H·F), v/kernel (D, H·P) and o/kernel (H·P, D).
  """

  def __init__(
    self,
    shape: HeadShape,
    width: int,
    *,
    make: Callable[[int, int], Linear],
  ):
    """Make the projections.

    Args:
      shape: H, F and P.
      width: D.
      make: makes a linear layer from the widths of its input and output.
    """
    H, F, P = shape
    self.q = make(width, H * F)
    self.k = make(width, H * F)
    self.v = make(width, H * P)
    self.o = make(H * P, width)


class PolynomialMixer(Mixer):
  """Abstract: a mixer around `pallas_kernels.polynomial_attention`.

  A subclass sets `config_type` and `coefficients`, and defines `query` and
  `key`.
  """

  no_time_axis = None
  state_rule = "sum"
  #: Coefficients of sim as a polynomial of q·k / √F.
  coefficients: ClassVar[Coefficients]

  @explain_unknown_names
  def __init__(
    self,
    width: int,
    config: PolynomialConfig,
    *,
    dtype: DType | None = "float32",
    param_dtype: DType = "float32",
    precision: Precision | None = None,
    kernel_init: nnx.Initializer | None = None,
    rngs: nnx.Rngs,
  ):
    """Make the projections, with kernels from N(0, 0.02²).

    Args:
      width: D.
      config: the mixer's config.
      dtype: the compute dtype. None: `param_dtype`.
      param_dtype: dtype of the parameters.
      precision: of the projections' float32 products: "default", "high",
        "highest" or a jax.lax.Precision. None: jax's setting. The operator's
        always have the highest.
      kernel_init: draws the initial kernels instead. None: N(0, 0.02²).
      rngs: draws the initial parameters.

    Raises:
      ValueError: an argument does not fit, or the heads do not fit the width.
    """
    super().__init__(width, config, dtype=dtype, param_dtype=param_dtype)
    self.shape = config.shape(width)
    _warn_of_floor(config, width)
    self.heads_to_split = self.shape.heads
    make = functools.partial(
      linear,
      dtype=self.dtype,
      param_dtype=param_dtype,
      precision=precision,
      kernel_init=kernel_init,
      rngs=rngs,
    )
    self.project = Projections(self.shape, width, make=make)
    self.eps = config.eps
    self.implementation = config.implementation

  @abc.abstractmethod
  def query(self, x_D: Array) -> Array:
    """Return queries (…, H, F) of tokens (…, D)."""

  @abc.abstractmethod
  def key(self, x_D: Array) -> Array:
    """Return keys (…, H, F) of tokens (…, D)."""

  def value(self, x_D: Array) -> Array:
    """Return values (…, H, P) of tokens (…, D)."""
    return self.split_heads(self.project.v(x_D))

  def split_heads(self, x: Array) -> Array:
    """Return (…, H, F) of (…, H·F)."""
    return x.reshape(*x.shape[:-1], self.shape.heads, -1)

  def output(self, o_HP: Array) -> Array:
    """Return y (…, D) of the operator's outputs (…, H, P)."""
    return self.project.o(o_HP.reshape(*o_HP.shape[:-2], -1))

  def _mix(
    self,
    x_BTD: Array,
    *,
    segment_ids: Array | None,
    axes: ShardAxes | None,
    query_positions: Array | None,
  ) -> Array:
    k_BTHF, v_BTHP = self.key(x_BTD), self.value(x_BTD)
    if query_positions is not None and self._is_cheaper_alone(
      x_BTD, query_positions, axes
    ):
      x_BMD = take_positions(x_BTD, query_positions)
      o_BMHP = polynomial_attention_at(
        self.query(x_BMD),
        k_BTHF,
        v_BTHP,
        query_positions,
        segment_ids=segment_ids,
        coefficients=self.coefficients,
        eps=self.eps,
      )
      return self.output(o_BMHP)
    o_BTHP = polynomial_attention(
      self.query(x_BTD),
      k_BTHF,
      v_BTHP,
      segment_ids=segment_ids,
      axes=axes,
      implementation=self.implementation,
      coefficients=self.coefficients,
      eps=self.eps,
    )
    o_BTD = o_BTHP.reshape(*o_BTHP.shape[:2], -1)
    return self.project.o(take_positions(o_BTD, query_positions))

  def _is_cheaper_alone(
    self, x_BTD: Array, positions_BM: Array, axes: ShardAxes | None
  ) -> bool:
    """Whether to compute only these queries' rows of the attention matrix."""
    has_whole_rows = axes is None or axes.time is None
    if self.implementation is not None or not has_whole_rows:
      return False
    B, T, D = x_BTD.shape
    H, F, P = self.shape
    call = PositionCall(
      rows=B if axes is None else B // axes.devices(axes.batch),
      length=T,
      positions=positions_BM.shape[1],
      width=D,
      heads=H,
      features=F,
      value_features=P,
      coefficients=self.coefficients,
      itemsize=self.dtype.itemsize,
    )
    return is_cheaper_alone(call, expected_form(self.dtype))

  def init_state(self, batch: int) -> State:
    """Return the state before a document's first token: all sums are 0."""
    return zero_state(
      batch, *self.shape, coefficients=self.coefficients, dtype=self.dtype
    )

  def _prefill(
    self,
    x_BTD: Array,
    state: State,
    *,
    segment_ids: Array | None,
    axes: ShardAxes | None,
  ) -> tuple[Array, State]:
    o_BTHP, state = polynomial_attention(
      self.query(x_BTD),
      self.key(x_BTD),
      self.value(x_BTD),
      segment_ids=segment_ids,
      initial_state=state,
      return_state=True,
      axes=axes,
      implementation=self.implementation,
      coefficients=self.coefficients,
      eps=self.eps,
    )
    return self.output(o_BTHP), state

  def _step(self, x_BD: Array, state: State) -> tuple[Array, State]:
    o_BHP, state = polynomial_attention_step(
      state,
      self.query(x_BD),
      self.key(x_BD),
      self.value(x_BD),
      coefficients=self.coefficients,
      eps=self.eps,
    )
    return self.output(o_BHP), state

  def attention_matrix(self, x_BTD: Array) -> Array:
    """Return A (B, H, T, T) = sim / (Σ_s sim + eps), to look at.

    Its rows sum to at most 1. Time and memory are quadratic in T.
    """
    return polynomial_attention_weights(
      self.query(x_BTD),
      self.key(x_BTD),
      coefficients=self.coefficients,
      eps=self.eps,
    )


def _warn_of_floor(config: PolynomialConfig, width: int) -> None:
  """Warn where the heads do not divide the width, and nobody chose P.

  Python shows the same warning once. The models of the paper have 12 heads at
  widths from 64 to 512. Their eps tells that the floor is meant.
  """
  H = config.heads
  is_chosen = config.value_features is not None or config.eps == OFFICIAL_EPS
  if is_chosen or width % H == 0:
    return
  P = width // H
  warnings.warn(
    f"{type(config).__name__}.heads={H} does not divide the width {width}: "
    f"each head has floor({width} / {H}) = {P} values, {H * P} in all; set "
    f"heads to a divisor, or value_features={P} if this is meant",
    stacklevel=2,
  )
