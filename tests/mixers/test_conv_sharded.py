"""Tests of the short convolution with time split over devices."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from mixer_subject import split
import numpy as np
import pytest

from rebased_jax import BaseConvConfig, ShardAxes, Site

_B, _T, _D = 4, 16, 6
_AXES = ShardAxes(batch="data", time=("a", "b"))
_CHANNELS = ShardAxes(heads="data", time=("a", "b"))  # 2 or 4 do or not divide
# Rows of documents; over 8 devices of 2 tokens, over 4 of 4.
_IDS_BT = np.array(
  [
    [1] * 16,
    [1] * 8 + [2] * 8,
    [1, 1, 1, 2, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 1],
    np.arange(16) % 2,
  ],
  np.int32,
)


def _mesh(*shape: int, kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
  types = (kind,) * 3
  return jax.make_mesh(shape, ("data", "a", "b"), axis_types=types)


@functools.cache
def _subject(taps: int):
  make = lambda: BaseConvConfig(taps).make(Site(_D), rngs=nnx.Rngs(0))
  graph, params = split(make)
  draw = lambda seed, *shape: np.float32(
    np.random.default_rng(seed).normal(size=shape)
  )
  x_BTD, past_BKD = draw(1, _B, _T, _D), draw(2, _B, taps - 1, _D)
  weight_BTD = draw(3, _B, _T, _D)

  def loss(params, x_BTD, past_BKD, ids_BT, axes):
    y_BTD, after_BKD = nnx.merge(graph, params).prefill(
      x_BTD, past_BKD, segment_ids=ids_BT, axes=axes
    )
    total = (weight_BTD * y_BTD).sum() + 0.3 * jnp.square(after_BKD).sum()
    return total, (y_BTD, after_BKD)

  gradient = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
  run = jax.jit(gradient, static_argnums=4)
  return functools.partial(run, params, x_BTD, past_BKD)


@pytest.mark.parametrize(
  ("shape", "axes", "documents", "kind"),
  [
    ((1, 2, 4), _AXES, False, AxisType.Auto),
    ((2, 4, 1), _AXES, True, AxisType.Explicit),
    ((2, 2, 2), _CHANNELS, True, AxisType.Auto),
    ((4, 2, 1), _CHANNELS, True, AxisType.Explicit),
  ],
)
def test_time_over_devices_is_one_device(shape, axes, documents, kind) -> None:
  run = _subject(3)
  ids_BT = _IDS_BT if documents else None
  wanted = run(ids_BT, None)
  with jax.set_mesh(_mesh(*shape, kind=kind)):
    found = run(ids_BT, axes)
    text = run.func.lower(*run.args, ids_BT, axes).compile().as_text()
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, 1e-5, 1e-5)  # order of sums
  assert "collective-permute" in text
  # With the batch split no token is gathered. With channels split, those of
  # the gate are. Under Explicit axes the result is gathered, as x is whole.
  gathers = axes == _CHANNELS or kind == AxisType.Explicit
  assert gathers or "all-gather" not in text


def test_too_few_tokens_on_a_device() -> None:
  run = _subject(4)
  with (
    jax.set_mesh(_mesh(1, 2, 4)),
    pytest.raises(ValueError, match="4 taps over a row of 16 .* at least 3"),
  ):
    run(None, _AXES)
