"""The loss in parts is the plain one: values, gradients, memory, meshes."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest

from pallas_kernels import _compat
from rebased_jax import ShardAxes
from train.cross_entropy import _total_and_best, cross_entropy

B, T, D, V = 4, 12, 16, 37
# float32: the same sums in another order. bfloat16: the logits are rounded to
# it, ∂loss/∂z is for the products, and x and E's gradients are; 2⁻⁹ each.
TOLERANCES = {"float32": 1e-6, "bfloat16": 1e-2}


def _inputs(dtype: str = "float32"):
  keys = jax.random.split(jax.random.key(0), 4)
  x_BTD = jax.random.normal(keys[0], (B, T, D)).astype(dtype)
  embedding_VD = jax.random.normal(keys[1], (V, D))
  targets_BT = jax.random.randint(keys[2], (B, T), 0, V)
  weights_BT = jax.random.uniform(keys[3], (B, T)).at[1].set(0)
  return x_BTD, embedding_VD, targets_BT, weights_BT


def _run(inputs, **options):
  """(loss, tokens), and the gradients of x and E."""
  loss = lambda *inputs: cross_entropy(*inputs, **options)

  def scaled(*inputs):
    result = loss(*inputs)
    return 3 * result[0], result

  run = jax.jit(jax.grad(scaled, argnums=(0, 1), has_aux=True))
  grads, result = run(*inputs)
  return result, grads


def _assert_near(found, wanted, tolerance: float) -> None:
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
    x, y = np.float64(x), np.float64(y)
    assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_parts_are_the_whole(dtype: str) -> None:
  inputs = _inputs(dtype)
  wanted = _run(inputs)
  for chunks in (2, 12) if dtype == "float32" else (3,):
    (loss, tokens), grads = _run(inputs, chunks=chunks)
    _assert_near((loss, tokens), wanted[0], TOLERANCES[dtype])
    _assert_near(grads, wanted[1], TOLERANCES[dtype])
  # Without a gradient it is another program, whose logits stay in float32.
  alone = jax.jit(lambda *x: cross_entropy(*x, chunks=4))(*inputs)
  _assert_near(alone, wanted[0], 1e-6)


@pytest.fixture
def gpu(monkeypatch) -> None:
  """A GPU's program, here: a part's logits are read in one reduction."""
  monkeypatch.setattr(_compat, "platform", lambda: "gpu")


def test_one_reduction_gives_the_same(gpu) -> None:
  inputs = _inputs()
  wanted = _run(inputs)
  found = _run(inputs, chunks=4)
  one = str(jax.make_jaxpr(_total_and_best)(jnp.ones(3)))
  assert one.count("reduce") == 1
  _assert_near(found[0], wanted[0], 1e-6)
  _assert_near(found[1], wanted[1], TOLERANCES["float32"])


def _wide_inputs(words: int = 1048):
  """In bfloat16, of a vocabulary that the kernel takes."""
  keys = jax.random.split(jax.random.key(0), 4)
  x_BTD = 2 * jax.random.normal(keys[0], (2, 4, D), jnp.bfloat16)
  embedding_VD = jax.random.normal(keys[1], (words, D))
  targets_BT = jax.random.randint(keys[2], (2, 4), 0, words)
  targets_BT = targets_BT.at[0].set(jnp.array([0, 1023, 1024, words - 1]))
  return x_BTD, embedding_VD, targets_BT, jax.random.uniform(keys[3], (2, 4))


@pytest.fixture
def interpreted(monkeypatch):
  """The Hopper kernel, interpreted on this machine's CPU."""
  if not _compat.has_mosaic_gpu():
    pytest.skip("the GPU kernels need jax ≥ 0.11")
  import jax.experimental.pallas.mosaic_gpu as plgpu

  with monkeypatch.context() as patch:
    patch.setattr(_compat, "is_hopper", lambda: True)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
      yield


def _assert_kernel(rows: int, words: int, *, rtol: float) -> None:
  """The kernel of such logits against the equations in float64."""
  from pallas_kernels.cross_entropy import gpu

  rng = np.random.default_rng(0)
  logits = (4 * rng.normal(size=(rows, words))).astype(jnp.bfloat16)
  logits[0, 5:7] = 64  # the first counts
  targets = rng.integers(0, words, rows).astype(np.int32)
  targets[:3] = 5, words - 1, 0
  weights = rng.uniform(size=rows).astype(np.float32)
  weights[1] = 0
  dz, top, total, best = jax.device_get(
    gpu.losses(*map(jnp.asarray, (logits, targets, weights)))
  )
  wide = logits.astype(np.float64)
  powers = np.exp(wide - wide.max(axis=1, keepdims=True))
  np.testing.assert_array_equal(top, wide.max(axis=1))
  np.testing.assert_allclose(total, powers.sum(axis=1), rtol=rtol)
  np.testing.assert_array_equal(best, wide.argmax(axis=1))
  wanted = powers / powers.sum(axis=1, keepdims=True)
  wanted[np.arange(rows), targets] -= 1
  wanted *= weights[:, None]
  assert dz.dtype == logits.dtype and not dz[1].any()
  error = np.linalg.norm(dz.astype(np.float64) - wanted)
  assert error <= 2.0**-8 * np.linalg.norm(wanted)  # half of its last bit


@pytest.mark.parametrize("words", [1024, 1048, 5128])
def test_the_kernel_is_the_equations(interpreted, words) -> None:
  _assert_kernel(3, words, rtol=1e-6)


@pytest.mark.parametrize("split", [False, True])
def test_parts_through_the_kernel(interpreted, monkeypatch, split) -> None:
  inputs, options = _wide_inputs(), {}
  mesh = jax.make_mesh((2, 1), ("data", "tensor"), (AxisType.Auto,) * 2)
  if split:
    options = dict(axes=ShardAxes(batch="data"))
  with jax.set_mesh(mesh):
    jaxpr = jax.make_jaxpr(lambda *x: _run(x, chunks=2, **options))(*inputs)
    found = _run(inputs, chunks=2, **options)
    monkeypatch.setattr(_compat, "is_hopper", lambda: False)
    wanted = _run(inputs, chunks=2, **options)
  assert "cross_entropy" in str(jaxpr)
  _assert_near(found[0], wanted[0], 1e-6)
  _assert_near(found[1], wanted[1], TOLERANCES["bfloat16"])


@pytest.mark.gpu
@pytest.mark.skipif(not _compat.is_hopper(), reason="no Hopper GPU")
@pytest.mark.parametrize("rows", [3, 601])  # fewer than programs, and more
@pytest.mark.parametrize("words", [1024, 1032, 50304])
def test_the_kernel_on_the_card(rows, words) -> None:
  # Its powers are the card's quick ones, within 2⁻²¹ for each unit of the
  # exponent, of which there are up to 64.
  _assert_kernel(rows, words, rtol=3e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not _compat.is_hopper(), reason="no Hopper GPU")
def test_parts_on_the_card(monkeypatch) -> None:
  inputs = _wide_inputs(50304)
  found, again = (_run(inputs, chunks=2) for _ in range(2))
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(a, b)
  monkeypatch.setattr(_compat, "is_hopper", lambda: False)
  wanted = _run(inputs, chunks=2)
  _assert_near(found[0], wanted[0], 3e-5)
  _assert_near(found[1], wanted[1], TOLERANCES["bfloat16"])
