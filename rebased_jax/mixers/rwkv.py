"""RWKV-4's time-mix (arXiv 2305.13048).

    x̃_j = μ_j ∘ x_t + (1 − μ_j) ∘ x_{t−1}                   for j in k, v, r
    k_t = W_k x̃_k,  v_t = W_v x̃_v,  r_t = W_r x̃_r
    y_t = W_o (σ(r_t) ∘ wkv_t)

with x = 0 before a document's first token, and each channel's mean of values

    wkv_t = (Σ_{i<t} e^{(t−1−i) w + k_i} v_i + e^{u + k_t} v_t)
            / (the same without v),       w = −e^{decay}

in chunks, without the official CUDA kernel's limit of 2048 tokens; `xla.py` has
the recurrence. A decay above 40 counts as 40, where e^w has long been 0.
"""

import dataclasses
from typing import Literal, NamedTuple

from flax import nnx
import jax
from jax import Array
import jax.numpy as jnp

from pallas_kernels import ShardAxes, document_runs, numerics
from pallas_kernels.numerics import sum_dtype
from pallas_kernels.wkv import xla
from rebased_jax.mixers import base

_LARGEST_DECAY = 40.0


@dataclasses.dataclass(frozen=True)
class RWKVConfig(base.MixerConfig):
  """The defaults are what the ReBased paper's official code does.

  initialization: "published": all four projections U(±1/√D), since the code's
    own initialisation never reaches them. "intended": those of k, r and the
    output 0, as the code marks them, and v's N(0, 0.02²). Only the output
    projection has a gradient then, until it has moved.
  wkv_dtype: "bfloat16": the recurrence is computed in float32, but its outputs
    and its gradients of k, v, decay and first are rounded to bfloat16, as in
    the code's float mode. "float32": they are not.
  """

  initialization: Literal["published", "intended"] = "published"
  wkv_dtype: Literal["bfloat16", "float32"] = "bfloat16"

  def __post_init__(self):
    base.one_of(self, "initialization", "published", "intended")
    base.one_of(self, "wkv_dtype", "bfloat16", "float32")

  def make(self, site: base.Site, *, rngs: nnx.Rngs) -> "RWKV":
    return RWKV(
      site.width,
      self,
      layer=site.layer,
      layers=site.layers,
      dtype=site.dtype,
      rngs=rngs,
    )


class RWKVState(NamedTuple):
  """What RWKV keeps of a document's past."""

  last_BD: Array  # the last token, in the mixer's dtype
  sums: xla.Sums  # (B, D) each, float32: Σ e^{…} v, Σ e^{…}, over e^maximum


class RWKV(base.Mixer):
  """The time-mix.

  Parameters: decay, first (u), mix_k, mix_v, mix_r (μ), all (D,), and
  {k,v,r,o}/kernel (D, D): 4D² + 5D. The first five start at values that differ
  from channel to channel and depend on the layer. The backward holds k and v,
  and the sums before each of √T chunks. Time cannot be split over a mesh.
  """

  def __init__(
    self,
    width: int,
    config: RWKVConfig,
    *,
    layer: int = 0,
    layers: int = 1,
    dtype: str = "float32",
    rngs: nnx.Rngs,
  ):
    base.check_made(width, config, RWKVConfig)
    start = _start(width, layer, layers)
    self.decay = nnx.Param(start.decay_D)
    self.first = nnx.Param(start.first_D)
    self.mix_k = nnx.Param(start.mix_k_D)
    self.mix_v = nnx.Param(start.mix_v_D)
    self.mix_r = nnx.Param(start.mix_r_D)
    make = lambda init: base.Linear(
      width,
      width,
      use_bias=False,
      kernel_init=init,
      dtype=jnp.dtype(dtype),
      param_dtype=jnp.float32,
      rngs=rngs,
    )
    if config.initialization == "published":
      others = values = _uniform(width**-0.5)  # PyTorch's default
    else:
      others, values = nnx.initializers.zeros, nnx.initializers.normal(0.02)
    self.k, self.v = make(others), make(values)
    self.r, self.o = make(others), make(others)
    self.rounded = config.wkv_dtype == "bfloat16"
    self.width, self.dtype = width, base.computation(dtype)
    self.sums_dtype = sum_dtype(self.dtype)

  def __call__(
    self,
    x_BTD: Array,
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
    query_positions: Array | None = None,
  ) -> Array:
    base.check_rows(self, x_BTD, segment_ids, query_positions=query_positions)
    state = self.init_state(x_BTD.shape[0])
    y_BMD, _ = self._row(x_BTD, state, segment_ids, axes, query_positions)
    return y_BMD

  def init_state(self, batch: int) -> RWKVState:
    shape = batch, self.width
    return RWKVState(
      jnp.zeros(shape, self.dtype), xla.empty(shape, self.sums_dtype)
    )

  def prefill(
    self,
    x_BTD: Array,
    state: RWKVState,
    *,
    segment_ids: Array | None = None,
    axes: ShardAxes | None = None,
  ) -> tuple[Array, RWKVState]:
    base.check_rows(self, x_BTD, segment_ids, state=state)
    return self._row(x_BTD, state, segment_ids, axes, None)

  def step(self, x_BD: Array, state: RWKVState) -> tuple[Array, RWKVState]:
    base.check_token(self, x_BD, state)
    x_BD = x_BD.astype(self.dtype)
    k_BD, v_BD = self._keys_and_values(x_BD, state.last_BD)
    cast = lambda x: x.astype(self.sums_dtype)
    w_1D, u_1D = self._decay_and_first()
    o_BD, sums = xla.step(
      cast(k_BD), cast(v_BD), w_1D[None], u_1D[None], state.sums
    )
    o_BD = self._rounded(o_BD).astype(self.dtype)
    return self._out(o_BD, x_BD, state.last_BD), RWKVState(x_BD, sums)

  def _row(self, x_BTD, state, segment_ids, axes, positions_BM):
    base.refuse_time_axis(
      "RWKV", axes, "its sums run from chunk to chunk; split batch or channels"
    )
    x_BTD = x_BTD.astype(self.dtype)
    before_BTD = jnp.concatenate(
      [state.last_BD[:, None], x_BTD[:, :-1]], axis=1
    )
    start_BT = jnp.zeros(x_BTD.shape[:2], bool)
    if segment_ids is not None:
      border_BT = jnp.diff(document_runs(segment_ids), axis=1) > 0
      start_BT = jnp.pad(border_BT, ((0, 0), (1, 0)))
      before_BTD = jnp.where(start_BT[..., None], 0, before_BTD)
    k_BTD, v_BTD = self._keys_and_values(x_BTD, before_BTD)
    w_D, u_D = self._decay_and_first()
    o_BTD, sums = xla.wkv(k_BTD, v_BTD, w_D, u_D, state.sums, start_BT)
    o_BTD = self._rounded(o_BTD)
    o_BMD, x_BMD, before_BMD = (
      base.take_positions(x, positions_BM) for x in (o_BTD, x_BTD, before_BTD)
    )
    y_BMD = self._out(o_BMD, x_BMD, before_BMD)
    return y_BMD, RWKVState(x_BTD[:, -1], sums)

  def _mix(self, mix: nnx.Param, x: Array, before: Array) -> Array:
    mix_D = mix[...].astype(sum_dtype(self.dtype))
    return numerics.scale_channels(x, mix_D) + numerics.scale_channels(
      before, 1 - mix_D
    )

  def _keys_and_values(self, x: Array, before: Array) -> tuple[Array, Array]:
    k = self.k(self._mix(self.mix_k, x, before))
    v = self.v(self._mix(self.mix_v, x, before))
    if self.rounded:
      k, v = _round_gradient(k), _round_gradient(v)
    return k, v

  def _decay_and_first(self) -> tuple[Array, Array]:
    """w and u (D,), in the dtype of the sums."""
    decay_D, u_D = self.decay[...], self.first[...]
    if self.rounded:
      decay_D, u_D = _round_gradient(decay_D), _round_gradient(u_D)
    decay_D = jnp.minimum(decay_D.astype(self.sums_dtype), _LARGEST_DECAY)
    return -jnp.exp(decay_D), u_D.astype(self.sums_dtype)

  def _rounded(self, o: Array) -> Array:
    return _round(o) if self.rounded else o

  def _out(self, o: Array, x: Array, before: Array) -> Array:
    r = self.r(self._mix(self.mix_r, x, before))
    return self.o(jax.nn.sigmoid(r) * o)


class _Start(NamedTuple):
  decay_D: Array
  first_D: Array
  mix_k_D: Array
  mix_v_D: Array
  mix_r_D: Array


def _start(width: int, layer: int, layers: int) -> _Start:
  """The first values of what is not a projection, by channel and layer."""
  i_D = jnp.arange(width, dtype=jnp.float32)
  depth = layer / max(layers - 1, 1)  # from 0 to 1
  speed_D = (i_D / max(width - 1, 1)) ** (0.7 + 1.3 * depth)
  mix_D = (i_D / width) ** (1 - layer / layers)
  return _Start(
    decay_D=-5 + 8 * speed_D,
    first_D=jnp.log(0.3) + 0.5 * ((i_D + 1) % 3 - 1),
    mix_k_D=mix_D,
    mix_v_D=mix_D + 0.3 * depth,
    mix_r_D=jnp.sqrt(mix_D),
  )


def _uniform(bound: float) -> nnx.Initializer:
  return lambda key, shape, dtype=jnp.float32, **_: jax.random.uniform(
    key, shape, dtype, minval=-bound, maxval=bound
  )


def _round(x: Array) -> Array:
  """To a bfloat16 value; the gradient is rounded too."""
  return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


@jax.custom_vjp
def _round_gradient(x: Array) -> Array:
  """x itself; its gradient is rounded to bfloat16 values."""
  return x


_round_gradient.defvjp(lambda x: (x, None), lambda _, dx: (_round(dx),))
