"""Cross-entropy, whole and in parts: values, gradients, memory, meshes."""

import contextlib

from hopper_cases import assert_lowers, on_the_card
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest

from pallas_kernels import ShardAxes, cross_entropy, devices
from pallas_kernels.cross_entropy import operator
from pallas_kernels.cross_entropy.xla import log_sum_and_best

B, T, D, V = 4, 12, 16, 37
# float32: the same sums in another order. bfloat16: the logits, ∂loss/∂z and
# the gradients of x and E are rounded to it, 2⁻⁹ each.
TOLERANCES = {"float32": 1e-6, "bfloat16": 1e-2}


def _inputs(dtype: str = "float32"):
  keys = jax.random.split(jax.random.key(0), 4)
  x_BTD = jax.random.normal(keys[0], (B, T, D)).astype(dtype)
  embedding_VD = jax.random.normal(keys[1], (V, D))
  targets_BT = jax.random.randint(keys[2], (B, T), 0, V)
  weights_BT = jax.random.uniform(keys[3], (B, T)).at[1].set(0)
  return x_BTD, embedding_VD, targets_BT, weights_BT


def _run(inputs, **options):
  """Return (loss, tokens), and the gradients of x and E."""
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
  for parts in (2, 12) if dtype == "float32" else (3,):
    (loss, tokens), grads = _run(inputs, parts=parts)
    _assert_near((loss, tokens), wanted[0], TOLERANCES[dtype])
    _assert_near(grads, wanted[1], TOLERANCES[dtype])
  # Without a gradient the logits stay in float32.
  alone = jax.jit(lambda *x: cross_entropy(*x, parts=4))(*inputs)
  _assert_near(alone, wanted[0], 1e-6)


@pytest.fixture
def gpu(monkeypatch) -> None:
  """Run the GPU's program here: one reduction reads a part's logits."""
  monkeypatch.setattr(devices, "platform", lambda: "gpu")


def test_one_reduction_gives_the_same(monkeypatch) -> None:
  inputs = _inputs()
  wanted = [_run(inputs, z_loss=z_loss) for z_loss in (0.0, 0.1)]
  monkeypatch.setattr(devices, "platform", lambda: "gpu")
  one = str(jax.make_jaxpr(log_sum_and_best)(jnp.ones(3)))
  assert one.count(" reduce[") == 1
  for options in (dict(parts=1), dict(parts=4), dict(parts=1, z_loss=0.1)):
    found = _run(inputs, **options)
    _assert_near(found, wanted["z_loss" in options], TOLERANCES["float32"])


def test_the_logits_get_no_gradient_by_scatter() -> None:
  # XLA could not fuse it, and would write an array of zeros as large as they.
  run = jax.jit(jax.grad(lambda *inputs: cross_entropy(*inputs)[0]))
  assert "scatter" not in run.lower(*_inputs()).as_text()


def test_bfloat16_products_take_a_bfloat16_gradient() -> None:
  run = jax.jit(jax.grad(lambda *x: cross_entropy(*x)[0], argnums=(0, 1)))
  text = run.lower(*_inputs("bfloat16")).as_text()
  products = [x for x in text.splitlines() if "dot_general" in x]
  assert len(products) == 3
  for product in products:
    operands = product.split(" : ")[1].split("->")[0]
    assert operands.count("xbf16>") == 2


def test_one_part_has_derivatives_of_any_kind(gpu) -> None:
  x, embedding, targets, weights = _inputs()
  x, targets, weights = x[:1, :3], targets[:1, :3], weights[:1, :3] + 1

  def loss(x):
    return cross_entropy(x, embedding, targets, weights, z_loss=0.1)[0]

  def plain(x):
    z = x @ embedding.T
    log_sum = jax.nn.logsumexp(z, axis=-1)
    nll = log_sum - jnp.take_along_axis(z, targets[..., None], -1)[..., 0]
    return (weights * (nll + 0.1 * log_sum**2)).sum()

  @jax.jit
  def derivatives(x):
    return [jax.jvp(jax.grad(f), (x,), (x + 1,)) for f in (loss, plain)]

  _assert_near(*derivatives(x), 1e-5)


def _wide_inputs(vocabulary_size: int = 1048):
  """Return inputs in bfloat16, with a vocabulary that the kernel takes."""
  keys = jax.random.split(jax.random.key(0), 4)
  x_BTD = 2 * jax.random.normal(keys[0], (2, 4, D), jnp.bfloat16)
  embedding_VD = jax.random.normal(keys[1], (vocabulary_size, D))
  targets_BT = jax.random.randint(keys[2], (2, 4), 0, vocabulary_size)
  targets_BT = targets_BT.at[0].set(
    jnp.array([0, 1023, 1024, vocabulary_size - 1])
  )
  return x_BTD, embedding_VD, targets_BT, jax.random.uniform(keys[3], (2, 4))


def _assert_kernel(rows: int, vocabulary_size: int, *, rtol: float) -> None:
  """Compare the kernel with the equations in float64."""
  from pallas_kernels.cross_entropy import gpu

  rng = np.random.default_rng(0)
  logits = (4 * rng.normal(size=(rows, vocabulary_size))).astype(jnp.bfloat16)
  logits[0, 5:7] = 64  # the first counts
  targets = rng.integers(0, vocabulary_size, rows).astype(np.int32)
  targets[:3] = 5, vocabulary_size - 1, 0
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


@pytest.mark.parametrize("vocabulary_size", [1024, 1048, 5128])
def test_the_kernel_is_the_equations(interpreted, vocabulary_size) -> None:
  _assert_kernel(3, vocabulary_size, rtol=1e-6)


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
  # So no token's loss is finite by accident.
  assert not np.isfinite(top[2:] + np.log(total[2:])).any()


@pytest.mark.parametrize("split, z_loss", [(False, 0), (True, 0), (True, 0.1)])
def test_parts_through_the_kernel(
  interpreted, monkeypatch, split, z_loss
) -> None:
  inputs, mesh = _wide_inputs(), contextlib.nullcontext()
  options = dict(z_loss=z_loss)
  if split:
    options["axes"] = ShardAxes(batch="data")
    mesh = jax.set_mesh(
      jax.make_mesh((2, 1), ("data", "tensor"), (AxisType.Auto,) * 2)
    )
  with mesh:
    jaxpr = jax.make_jaxpr(lambda *x: _run(x, parts=2, **options))(*inputs)
    found = _run(inputs, parts=2, **options)
    monkeypatch.setattr(devices, "is_hopper", lambda: False)
    wanted = _run(inputs, parts=2, **options)
  assert "cross_entropy" in str(jaxpr)
  _assert_near(found[0], wanted[0], 1e-6)
  _assert_near(found[1], wanted[1], TOLERANCES["bfloat16"])


@on_the_card
@pytest.mark.parametrize("rows", [3, 601])  # fewer than programs, and more
@pytest.mark.parametrize("vocabulary_size", [1024, 1032, 50304])
def test_the_kernel_on_the_card(rows, vocabulary_size) -> None:
  # It uses the card's fast exponentials. They are within 2⁻²¹ for each unit of
  # the exponent, which goes up to 64.
  _assert_kernel(rows, vocabulary_size, rtol=3e-5)


@on_the_card
def test_parts_on_the_card(monkeypatch) -> None:
  inputs = _wide_inputs(50304)
  found, again = (_run(inputs, parts=2) for _ in range(2))
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(a, b)
  monkeypatch.setattr(devices, "is_hopper", lambda: False)
  wanted = _run(inputs, parts=2)
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
    found = _run(split, parts=3, axes=ShardAxes(batch="data"))
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
  total, best = jax.jit(log_sum_and_best)(rows)
  wide = np.float64(rows[:4])
  top = wide.max(-1, keepdims=True)
  wanted = top[:, 0] + np.log(np.exp(wide - top).sum(-1))
  np.testing.assert_allclose(total[:4], wanted, rtol=1e-6)
  np.testing.assert_array_equal(best[:4], [1, 0, 1, 2])
  assert not np.isfinite(total[4:]).any()  # so no loss is finite by accident


def _equations(x_BTD, embedding_VD, targets_BT, weights_BT, z_loss=0.0):
  """Return the loss, dx and dE in float64."""
  x, embedding = np.float64(x_BTD), np.float64(embedding_VD)
  weights, targets = np.float64(weights_BT), np.asarray(targets_BT)
  z = x @ embedding.T
  powers = np.exp(z - z.max(-1, keepdims=True))
  softmax = powers / powers.sum(-1, keepdims=True)
  onehot = np.eye(embedding.shape[0])[targets]
  nll = -np.log((softmax * onehot).sum(-1))
  log_sum = np.log(powers.sum(-1)) + z.max(-1)
  loss = (weights * (nll + z_loss * log_sum**2)).sum()
  dlog_sum = 2 * z_loss * log_sum[..., None]
  dz = weights[..., None] * (softmax - onehot + dlog_sum * softmax)
  dembedding = np.einsum("btv,btd->vd", dz, x)
  return loss, dz @ embedding, dembedding


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize(
  "dtype, limit, z_loss",
  [
    ("float32", 2e-6, 0.0),
    ("float32", 2e-6, 0.1),
    ("bfloat16", 1e-2, 0.0),
    ("bfloat16", 1e-2, 0.1),
    ("float16", 2e-3, 0.0),
    ("float64", 1e-13, 0.0),
  ],
)
def test_values_and_gradients(parts, dtype, limit, z_loss) -> None:
  x, embedding, targets, weights = jax.device_get(_inputs())
  with jax.enable_x64(True):
    wide = "float64" if dtype == "float64" else "float32"
    embedding, weights = embedding.astype(wide), weights.astype(wide)
    inputs = x.astype(jnp.dtype(dtype)), embedding, targets, weights
    (loss, tokens), grads = _run(inputs, parts=parts, z_loss=z_loss)
    assert (loss.dtype, tokens.nll_BM.dtype) == (wide, wide)
    assert [g.dtype for g in grads] == [dtype, wide]
  # The products use E in x's dtype, and so do the equations.
  rounded = embedding.astype(jnp.dtype(dtype))
  wanted = _equations(inputs[0], rounded, targets, weights, z_loss)
  for a, b in zip((loss, *grads), wanted, strict=True):
    a = np.float64(a) / (1 if a.ndim == 0 else 3)  # `_run` scales by 3
    assert np.linalg.norm(a - b) <= limit * np.linalg.norm(b)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_single_token_and_a_vocabulary_of_one(parts) -> None:
  x, embedding, targets, weights = _inputs()
  one = x[:, :parts], embedding, targets[:, :parts], weights[:, :parts]
  loss = cross_entropy(*one, parts=parts)[0]
  np.testing.assert_allclose(loss, _equations(*one)[0], rtol=1e-5)
  # With V = 1 every loss is 0.
  alone = x, embedding[:1], jnp.zeros_like(targets), weights
  assert cross_entropy(*alone, parts=parts)[0] == 0


@pytest.mark.parametrize("parts", [1, 3])
def test_without_weights_every_token_counts_1(parts) -> None:
  *inputs, weights = _inputs()
  wanted = cross_entropy(*inputs, jnp.ones_like(weights), parts=parts)
  found = cross_entropy(*inputs, parts=parts)
  _assert_near(found, wanted, 0)


def test_the_kernel_lowers(hopper) -> None:
  """The smallest vocabulary of the kernel is one block of it."""
  from pallas_kernels.cross_entropy import gpu

  assert gpu.BLOCK == operator._FEWEST_LOGITS
  inputs = _wide_inputs(50304)
  run = lambda *x: _run(x, parts=2)
  assert_lowers(run, *inputs, kernel="cross_entropy", programs=1)


@pytest.mark.quick
def test_the_plain_loss_is_the_formula() -> None:
  x_BTD, embedding_VD, targets_BT, weights_BT = _inputs()
  z_BTV = np.float64(x_BTD) @ np.float64(embedding_VD).T
  nll_BT = np.log(np.exp(z_BTV).sum(-1)) - np.take_along_axis(
    z_BTV, np.asarray(targets_BT)[..., None], -1
  ).squeeze(-1)
  loss, tokens = cross_entropy(x_BTD, embedding_VD, targets_BT, weights_BT)
  np.testing.assert_allclose(tokens.nll_BM, nll_BT, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(loss, (nll_BT * weights_BT).sum(), rtol=1e-5)
  np.testing.assert_array_equal(
    tokens.correct_BM, z_BTV.argmax(-1) == targets_BT
  )


@pytest.mark.parametrize(
  "shape", [dict(data=4, time=2), dict(data=2, tensor=4)], ids=str
)
def test_over_a_mesh(shape: dict[str, int]) -> None:
  """Each device has rows and tokens; another axis may split V."""
  mesh = jax.make_mesh(
    tuple(shape.values()), tuple(shape), (AxisType.Auto,) * len(shape)
  )
  time = "time" if "time" in shape else None
  axes = ShardAxes(batch="data", time=time)
  wanted = _run(_inputs(), parts=1)
  x, embedding, *rest = _inputs()
  with jax.set_mesh(mesh):
    if "tensor" in shape:
      spec = jax.sharding.NamedSharding(mesh, jax.P(None, "tensor"))
      embedding = jax.device_put(embedding, spec)
    inputs = x, embedding, *rest
    found = _run(inputs, parts=3, axes=axes)
    # Another function runs where no gradient is asked for.
    plain = jax.jit(lambda *x: cross_entropy(*x, parts=3, axes=axes))(*inputs)
  _assert_near(found, wanted, TOLERANCES["float32"])
  _assert_near(plain, wanted[0], TOLERANCES["float32"])


def test_logits_are_never_whole() -> None:
  """Compare XLA's memory analysis, at 2048 tokens and V = 4096."""
  shape = lambda *x, dtype=jnp.float32: jax.ShapeDtypeStruct(x, dtype)
  inputs = (
    shape(2, 1024, 32),
    shape(4096, 32),
    shape(2, 1024, dtype=jnp.int32),
    shape(2, 1024),
  )

  def temporaries(parts: int) -> int:
    loss = lambda *inputs: cross_entropy(*inputs, parts=parts)[0]
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*inputs)
    return lowered.compile().memory_analysis().temp_size_in_bytes

  logits = 4 * 2 * 1024 * 4096
  assert temporaries(1) >= logits
  assert temporaries(16) < logits / 4


def test_a_wrong_z_loss_is_refused() -> None:
  for z_loss in (-1e-4, float("nan"), True, jnp.float32(0.1)):
    with pytest.raises(ValueError, match="z_loss=.*finite Python number ≥ 0"):
      cross_entropy(*_inputs(), z_loss=z_loss)


def test_parts_that_do_not_divide_are_refused() -> None:
  with pytest.raises(ValueError, match="parts=5: expected a divisor of"):
    _run(_inputs(), parts=5)
  mesh = jax.make_mesh((2, 4), ("data", "time"), (AxisType.Auto,) * 2)
  axes = ShardAxes(batch="data", time="time")
  message = f"parts=4: expected a divisor of the {T // 4} targets"
  with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
    _run(_inputs(), parts=4, axes=axes)
