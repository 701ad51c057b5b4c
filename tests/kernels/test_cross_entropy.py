"""The loss in parts is the plain one: values, gradients, memory, meshes."""

from hopper_cases import on_the_card
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest

from pallas_kernels import devices
from pallas_kernels.cross_entropy.xla import _total_and_best, cross_entropy
from rebased_jax import ShardAxes

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
  monkeypatch.setattr(devices, "platform", lambda: "gpu")


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


def test_what_the_kernel_makes_of_odd_logits(interpreted) -> None:
  from pallas_kernels.cross_entropy import gpu

  logits = np.full((4, 1024), -np.inf, np.float32)
  logits[0, [3, 9]] = 0, -1  # others have no weight
  logits[1] = 1e30
  logits[2, 7], logits[3, 7] = np.nan, np.inf
  targets, weights = np.full(4, 3, np.int32), np.ones(4, np.float32)
  dz, top, total, best = jax.device_get(
    gpu.losses(jnp.asarray(logits, jnp.bfloat16), targets, weights)
  )
  np.testing.assert_allclose(total[:2], [1 + np.exp(-1), 1024], rtol=1e-6)
  np.testing.assert_array_equal(best[:2], [3, 0])
  share = np.float64(dz[0, [3, 9]]) - [-0.2689, 0.2689]
  assert np.abs(share).max() < 2e-3 and np.count_nonzero(dz[0]) == 2
  # And so no loss that passes as one.
  assert not np.isfinite(top[2:] + np.log(total[2:])).any()


@pytest.mark.parametrize("split", [False, True])
def test_parts_through_the_kernel(interpreted, monkeypatch, split) -> None:
  inputs, options = _wide_inputs(), {}
  mesh = jax.make_mesh((2, 1), ("data", "tensor"), (AxisType.Auto,) * 2)
  if split:
    options = dict(axes=ShardAxes(batch="data"))
  with jax.set_mesh(mesh):
    jaxpr = jax.make_jaxpr(lambda *x: _run(x, chunks=2, **options))(*inputs)
    found = _run(inputs, chunks=2, **options)
    monkeypatch.setattr(devices, "is_hopper", lambda: False)
    wanted = _run(inputs, chunks=2, **options)
  assert "cross_entropy" in str(jaxpr)
  _assert_near(found[0], wanted[0], 1e-6)
  _assert_near(found[1], wanted[1], TOLERANCES["bfloat16"])


@on_the_card
@pytest.mark.parametrize("rows", [3, 601])  # fewer than programs, and more
@pytest.mark.parametrize("words", [1024, 1032, 50304])
def test_the_kernel_on_the_card(rows, words) -> None:
  # Its powers are the card's quick ones, within 2⁻²¹ for each unit of the
  # exponent, of which there are up to 64.
  _assert_kernel(rows, words, rtol=3e-5)


@on_the_card
def test_parts_on_the_card(monkeypatch) -> None:
  inputs = _wide_inputs(50304)
  found, again = (_run(inputs, chunks=2) for _ in range(2))
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(a, b)
  monkeypatch.setattr(devices, "is_hopper", lambda: False)
  wanted = _run(inputs, chunks=2)
  _assert_near(found[0], wanted[0], 3e-5)
  _assert_near(found[1], wanted[1], TOLERANCES["bfloat16"])


def test_one_reduction_over_a_split_vocabulary(gpu) -> None:
  mesh = jax.make_mesh((2, 4), ("data", "tensor"), (AxisType.Auto,) * 2)
  x, embedding, *rest = _inputs()
  embedding = embedding[:36]
  inputs = x, embedding, jnp.minimum(rest[0], 35), rest[1]
  wanted = _run(inputs)
  spec = jax.sharding.NamedSharding(mesh, jax.P("tensor", None))
  with jax.set_mesh(mesh):
    split = x, jax.device_put(embedding, spec), *inputs[2:]
    found = _run(split, chunks=3, axes=ShardAxes(batch="data"))
  _assert_near(found, wanted, TOLERANCES["float32"])


def test_what_one_reduction_makes_of_odd_logits(gpu) -> None:
  low = np.finfo(np.float32).min
  rows = np.float32(
    [
      [1, 3, 3, 2],  # the first of two
      [low, low, low, low],
      [-np.inf, 0, -np.inf, -1],
      [88, -88, 1e4, 1e4],
      [np.nan, 1, 2, 3],
      [1, np.inf, 2, 3],
    ]
  )
  total, best = jax.jit(_total_and_best)(rows)
  wide = np.float64(rows[:4])
  top = wide.max(-1, keepdims=True)
  wanted = top[:, 0] + np.log(np.exp(wide - top).sum(-1))
  np.testing.assert_allclose(total[:4], wanted, rtol=1e-6)
  np.testing.assert_array_equal(best[:4], [1, 0, 1, 2])
  assert not np.isfinite(total[4:]).any()  # and so no loss that passes as one


def test_the_plain_loss_is_the_formula() -> None:
  x_BTD, embedding_VD, targets_BT, weights_BT = _inputs()
  z_BTV = np.float64(x_BTD) @ np.float64(embedding_VD).T
  nll_BT = np.log(np.exp(z_BTV).sum(-1)) - np.take_along_axis(
    z_BTV, np.asarray(targets_BT)[..., None], -1
  ).squeeze(-1)
  loss, tokens = cross_entropy(x_BTD, embedding_VD, targets_BT, weights_BT)
  np.testing.assert_allclose(tokens.nll_BM, nll_BT, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(loss, (nll_BT * weights_BT).sum(), rtol=1e-5)
  np.testing.assert_array_equal(tokens.right_BM, z_BTV.argmax(-1) == targets_BT)


@pytest.mark.parametrize(
  "shape", [dict(data=4, time=2), dict(data=2, tensor=4)], ids=str
)
def test_over_a_mesh(shape: dict[str, int]) -> None:
  """Rows and tokens are each device's; another axis may split V."""
  mesh = jax.make_mesh(
    tuple(shape.values()), tuple(shape), (AxisType.Auto,) * len(shape)
  )
  time = "time" if "time" in shape else None
  axes = ShardAxes(batch="data", time=time)
  wanted = _run(_inputs(), chunks=1)
  x, embedding, *rest = _inputs()
  with jax.set_mesh(mesh):
    if "tensor" in shape:
      spec = jax.sharding.NamedSharding(mesh, jax.P(None, "tensor"))
      embedding = jax.device_put(embedding, spec)
    found = _run((x, embedding, *rest), chunks=3, axes=axes)
  _assert_near(found, wanted, TOLERANCES["float32"])


def test_logits_are_never_whole() -> None:
  """XLA's account of the gradient's program, at 2048 tokens of 4096 words."""
  shape = lambda *x, dtype=jnp.float32: jax.ShapeDtypeStruct(x, dtype)
  inputs = (
    shape(2, 1024, 32),
    shape(4096, 32),
    shape(2, 1024, dtype=jnp.int32),
    shape(2, 1024),
  )

  def temporaries(chunks: int) -> int:
    loss = lambda *inputs: cross_entropy(*inputs, chunks=chunks)[0]
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*inputs)
    return lowered.compile().memory_analysis().temp_size_in_bytes

  logits = 4 * 2 * 1024 * 4096
  assert temporaries(1) >= logits
  assert temporaries(16) < logits / 4


def test_parts_that_do_not_divide_are_refused() -> None:
  with pytest.raises(ValueError, match="loss_chunks=5: expected a divisor of"):
    _run(_inputs(), chunks=5)
