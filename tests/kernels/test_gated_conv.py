"""The gated convolution: XLA and kernel against float64 equations."""

import itertools

from flax import nnx
from hopper_cases import (
  assert_gradients_near,
  assert_lowers,
  on_the_card,
  same_bits,
)
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest

from pallas_kernels import ShardAxes, causal_conv, devices, gated_conv
from pallas_kernels.gated_conv import has_kernel
from rebased_jax import BaseConvConfig
from rebased_jax.mixers import base

ROUNDED = 2e-2  # XLA rounds every operation to bfloat16, 2⁻⁹ each
NAMES = ("y", "du", "dz", "dtaps", "dbias", "dz_bias")


def _inputs(B: int, T: int, D: int, K: int = 3, dtype="bfloat16"):
  rng = np.random.default_rng(0)
  normal = lambda *s: rng.normal(size=s).astype(np.float32)
  u, z, dy = (normal(B, T, D).astype(jnp.dtype(dtype)) for _ in range(3))
  return (u, z, normal(K, D), normal(D), normal(D)), dy


def _equations(u_BTD, z_BTD, taps_KD, bias_D, z_bias_D):
  K, T = taps_KD.shape[0], u_BTD.shape[1]
  before_BSD = np.pad(u_BTD, ((0, 0), (K - 1, 0), (0, 0)))
  c_BTD = bias_D + sum(taps_KD[j] * before_BSD[:, j : j + T] for j in range(K))
  return c_BTD, c_BTD * (z_BTD + z_bias_D) + u_BTD


def _wanted(inputs, dy_BTD):
  u, z, taps, bias, z_bias = map(np.float64, inputs)
  dy = np.float64(dy_BTD)
  K, T = taps.shape[0], u.shape[1]
  c, y = _equations(u, z, taps, bias, z_bias)
  e, dz = dy * (z + z_bias), dy * c
  after = np.pad(e, ((0, 0), (0, K - 1), (0, 0)))
  before = np.pad(u, ((0, 0), (K - 1, 0), (0, 0)))
  later = lambda j: after[:, K - 1 - j :][:, :T]
  du = dy + sum(taps[j] * later(j) for j in range(K))
  dtaps = [(e * before[:, j : j + T]).sum((0, 1)) for j in range(K)]
  return y, du, dz, np.stack(dtaps), e.sum((0, 1)), dz.sum((0, 1))


def _both(inputs, dy_BTD, axes=None):
  y_BTD, pull = jax.vjp(lambda *x: gated_conv(*x, axes=axes), *inputs)
  return y_BTD, *pull(dy_BTD)


def _assert_near(found, wanted) -> None:
  for name, a, b in zip(NAMES, found, wanted, strict=True):
    assert a.shape == b.shape, name
    error = np.linalg.norm(np.float64(a) - b) / np.linalg.norm(b)
    # 16 bits round to 2⁻⁹ of a value at most, and y has five roundings. Sums
    # are float32.
    limit = 2e-6 if a.dtype == np.float32 else 2.5e-3
    assert error <= (1e-2 if name == "y" else limit), (name, error)


def _masked_wanted(inputs, dy_BTD, ids_BT):
  """Return `_wanted` of packed documents: each one is a separate row."""
  rows = []
  for u, z, dy, ids in zip(*inputs[:2], dy_BTD, ids_BT, strict=True):
    cuts = [0, *(np.flatnonzero(ids[1:] != ids[:-1]) + 1), len(ids)]
    pieces = [
      _wanted((u[None, i:j], z[None, i:j], *inputs[2:]), dy[None, i:j])
      for i, j in itertools.pairwise(cuts)
    ]
    joined = [
      np.concatenate(x, axis=1) for x in list(zip(*pieces, strict=True))[:3]
    ]
    sums = [sum(x) for x in list(zip(*pieces, strict=True))[3:]]
    rows.append((joined, sums))
  tokens = [np.concatenate(x) for x in zip(*(r[0] for r in rows), strict=True)]
  sums = [sum(x) for x in zip(*(r[1] for r in rows), strict=True)]
  return *tokens, *sums


# XLA rounds the five operations of each pass to 16 bits.
LIMITS = {"float32": 1e-6, "bfloat16": 1e-2, "float16": 2e-3}


@pytest.mark.parametrize(
  "T, K, dtype, documents",
  [
    (1, 3, "float32", False),
    (2, 4, "float32", True),  # fewer tokens than taps
    (17, 3, "float32", True),
    (5, 1, "bfloat16", True),
    (17, 3, "bfloat16", False),
    (17, 3, "float16", True),
  ],
)
def test_values_and_gradients_of_xla(T, K, dtype, documents) -> None:
  inputs, dy_BTD = _inputs(2, T, 7, K, dtype)
  ids_BT = None
  if documents:
    ids_BT = np.random.default_rng(1).integers(0, 2, (2, T))

  def run(inputs, dy_BTD):
    call = lambda *x: gated_conv(*x, segment_ids=ids_BT)
    y_BTD, pull = jax.vjp(call, *inputs)
    return y_BTD, *pull(dy_BTD)

  found = jax.device_get(jax.jit(run)(inputs, dy_BTD))
  ids_BT = np.zeros((2, T)) if ids_BT is None else ids_BT
  wanted = _masked_wanted(inputs, dy_BTD, ids_BT)
  for name, a, b in zip(NAMES, found, wanted, strict=True):
    assert a.shape == b.shape, name
    error = np.linalg.norm(np.float64(a) - b) / np.linalg.norm(b)
    assert error <= LIMITS[dtype], (name, error)


def test_in_float64() -> None:
  inputs, dy_BTD = _inputs(2, 7, 5, dtype="float32")
  with jax.enable_x64(True):
    wide = jax.tree.map(np.float64, (inputs, dy_BTD))
    found = jax.device_get(jax.jit(_both)(*wide))
  for a, b in zip(found, _wanted(inputs, dy_BTD), strict=True):
    assert a.dtype == np.float64
    assert np.linalg.norm(a - b) <= 1e-13 * np.linalg.norm(b)


@pytest.mark.quick
def test_without_a_bias_of_the_gate() -> None:
  (*inputs, z_bias_D), _ = _inputs(2, 7, 5, dtype="float32")
  wanted = gated_conv(*inputs, np.zeros_like(z_bias_D))
  np.testing.assert_array_equal(gated_conv(*inputs), wanted)


@pytest.mark.parametrize("cut", [1, 2, 6])
def test_a_state_continues_a_row(cut) -> None:
  """Two calls of `causal_conv` are one, wherever the row is cut."""
  (u, _, taps, bias, _), _ = _inputs(2, 9, 5, dtype="float32")
  ids = np.array([[0] * 5 + [1] * 4, [0] * 9])
  wanted, last = causal_conv(u, taps, bias, segment_ids=ids)
  # A document that continues after the cut keeps its past; a new one has none.
  same = ids[:, cut] == ids[:, cut - 1]
  first, state = causal_conv(u[:, :cut], taps, bias, segment_ids=ids[:, :cut])
  state = jnp.where(same[:, None, None], state, 0)
  second, after = causal_conv(
    u[:, cut:],
    taps,
    bias,
    initial_state=state,
    segment_ids=ids[:, cut:],
  )
  found = jnp.concatenate([first, second], axis=1)
  np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
  np.testing.assert_array_equal(after, last)


@pytest.mark.parametrize(
  "axes",
  [
    ShardAxes(batch="data", time="other"),
    ShardAxes(time=("data", "other")),
    ShardAxes(heads="data", time="other"),
  ],
)
def test_time_over_a_mesh(axes) -> None:
  inputs, dy_BTD = _inputs(2, 12, 6, dtype="float32")
  ids_BT = np.array([[0] * 5 + [1] * 7, [0, 1] * 6])
  mesh = jax.make_mesh((2, 2), ("data", "other"), (AxisType.Auto,) * 2)

  def run(inputs, dy_BTD):
    call = lambda *x: gated_conv(*x, segment_ids=ids_BT, axes=axes)
    y_BTD, pull = jax.vjp(call, *inputs)
    return y_BTD, *pull(dy_BTD)

  with jax.set_mesh(mesh):
    found = jax.device_get(jax.jit(run)(inputs, dy_BTD))
  _assert_near(found, _masked_wanted(inputs, dy_BTD, ids_BT))


CELLS = [
  (1, 1, 128, 3, "bfloat16"),
  (1, 2, 128, 3, "float16"),  # fewer tokens than taps
  (2, 7, 256, 3, "bfloat16"),
  (1, 13, 384, 4, "bfloat16"),
  (3, 5, 128, 2, "bfloat16"),
  (2, 3, 128, 1, "float16"),
]


@pytest.mark.parametrize("B, T, D, K, dtype", CELLS)
@pytest.mark.parametrize("programs", [1, 8])
def test_interpreted_kernel(
  interpreted, monkeypatch, B, T, D, K, dtype, programs
) -> None:
  from pallas_kernels.gated_conv import gpu

  monkeypatch.setattr(gpu, "PROGRAMS", programs)
  inputs, dy_BTD = _inputs(B, T, D, K, dtype)
  assert has_kernel(inputs[0], K)
  found = jax.jit(_both)(inputs, dy_BTD)
  _assert_near(found, _wanted(inputs, dy_BTD))


def test_parameters_in_bfloat16(interpreted) -> None:
  (u, z, *parameters), dy_BTD = _inputs(1, 5, 128)
  inputs = u, z, *(p.astype(jnp.bfloat16) for p in parameters)
  found = jax.jit(_both)(inputs, dy_BTD)
  assert [x.dtype for x in found] == [jnp.bfloat16] * 6
  _assert_near(found, _wanted(inputs, dy_BTD))


def _mixer(D: int = 128):
  config, site = BaseConvConfig(), base.Site(width=D, dtype="bfloat16")
  return config.make(site, rngs=nnx.Rngs(0))


def _gradients(mixer, x_BTD, axes=None, **options):
  graph, params = nnx.split(mixer)

  def loss(params, x_BTD):
    y = nnx.merge(graph, params)(x_BTD, axes=axes, **options)
    return jnp.square(y.astype(jnp.float32)).sum()

  run = jax.jit(jax.grad(loss, argnums=(0, 1)))
  lowered = run.trace(params, x_BTD).jaxpr
  return run(params, x_BTD), str(lowered).count("gated_conv_backward")


def test_the_mixer_takes_it_where_it_can(interpreted, monkeypatch) -> None:
  mixer = _mixer()
  x_BTD = np.random.default_rng(1).normal(size=(2, 6, 128)).astype(np.float32)
  predicted = dict(query_positions=np.array([[5, 2], [0, 5]]))
  found, kernels = _gradients(mixer, x_BTD, **predicted)
  assert kernels
  ids = np.repeat([[0, 1]], 3, axis=1).repeat(2, axis=0)
  assert not _gradients(mixer, x_BTD, segment_ids=ids)[1]
  monkeypatch.setattr(devices, "is_hopper", lambda: False)
  wanted, kernels = _gradients(mixer, x_BTD, **predicted)
  assert not kernels
  assert_gradients_near(found, wanted, ROUNDED)


@pytest.mark.parametrize(
  "axes, has_kernel",
  [
    (ShardAxes(batch=("data", "other")), True),
    (ShardAxes(batch="data"), False),  # the other may split channels
    (ShardAxes(batch="data", time="other"), False),
    (ShardAxes(batch="data", heads="other"), False),
  ],
)
def test_rows_over_a_mesh(interpreted, monkeypatch, axes, has_kernel) -> None:
  mixer = _mixer()
  x_BTD = np.random.default_rng(1).normal(size=(4, 6, 128)).astype(np.float32)
  mesh = jax.make_mesh((2, 2), ("data", "other"), (AxisType.Auto,) * 2)
  with jax.set_mesh(mesh):
    found, kernels = _gradients(mixer, x_BTD, axes)
  assert bool(kernels) == has_kernel
  monkeypatch.setattr(devices, "is_hopper", lambda: False)
  assert_gradients_near(found, _gradients(mixer, x_BTD)[0], ROUNDED)


@pytest.mark.parametrize("shape", [(2, 7, 128), (8, 4096, 768)])
def test_the_kernel_lowers(hopper, shape) -> None:
  of = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
  tokens = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  parameters = of(3, shape[-1]), of(shape[-1]), of(shape[-1])
  inputs = (tokens, tokens, *parameters), tokens
  assert_lowers(_both, *inputs, kernel="gated_conv_backward", programs=1)


@pytest.mark.parametrize(
  "shape, taps, dtype",
  [
    ((1, 2, 96), 3, "bfloat16"),
    ((1, 2, 128), 5, "bfloat16"),
    ((1, 2, 128), 3, "float32"),
    ((0, 2, 128), 3, "bfloat16"),
  ],
)
def test_what_the_kernel_does_not_take(monkeypatch, shape, taps, dtype):
  monkeypatch.setattr(devices, "is_hopper", lambda: True)
  assert not has_kernel(np.zeros(shape, dtype), taps)


@on_the_card
@pytest.mark.parametrize(
  "B, T, D, K, dtype", [*CELLS, (3, 1063, 768, 3, "bfloat16")]
)
def test_the_kernel_on_the_card(B, T, D, K, dtype) -> None:
  inputs, dy_BTD = _inputs(B, T, D, K, dtype)
  assert has_kernel(inputs[0], K)
  call = jax.jit(_both)
  found = same_bits(call, inputs, dy_BTD)
  _assert_near(found, _wanted(inputs, dy_BTD))
