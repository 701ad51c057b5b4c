"""Calls inside a `jax.shard_map`, which by default checks what varies."""

import dataclasses
import warnings

from flax import nnx
from hopper_cases import assert_gradients_near
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import model_cases
import numpy as np
import pytest

from pallas_kernels import (
  BASED,
  cross_entropy,
  devices,
  gelu,
  polynomial_attention,
  zero_state,
)
from rebased_jax import (
  AttentionConfig,
  BaseConvConfig,
  BasedConfig,
  HyenaConfig,
  MambaConfig,
  ModelConfig,
  ReBasedConfig,
  RWKVConfig,
)

B, T, D = 4, 70, 128  # two chunks of the operator
CONFIG = ModelConfig(
  first=BaseConvConfig(),
  second=BasedConfig(heads=2, features=8, implementation="xla"),
  vocab_size=32,
  width=D,
  mlp_width=D,
)


def _split(call, *, checks: bool, whole: int = 0):
  """Return `call` on each device's rows, summed over the devices.

  Args:
    call: returns a sum over its rows.
    checks: whether the map checks what varies.
    whole: number of first inputs that every device has whole.
  """

  def run(*inputs):
    specs = [
      jax.P() if n < whole else jax.P("data") for n in range(len(inputs))
    ]
    local = lambda *x: jax.lax.psum(call(*x), "data")
    return jax.shard_map(
      local, in_specs=tuple(specs), out_specs=jax.P(), check_vma=checks
    )(*inputs)

  return run


@pytest.fixture
def mesh():
  with jax.set_mesh(jax.make_mesh((2,), ("data",), (AxisType.Auto,))):
    yield


def _assert_same_gradients(call, *inputs, whole: int, limit: float) -> None:
  """Compare the gradients of floating inputs with those on one device."""
  numbers = tuple(
    n
    for n, x in enumerate(inputs)
    if jnp.issubdtype(jax.tree.leaves(x)[0].dtype, jnp.floating)
  )
  run = _split(call, checks=True, whole=whole)
  found = jax.jit(jax.grad(run, argnums=numbers))(*inputs)
  with pytest.MonkeyPatch.context() as plain:
    plain.setattr(devices, "is_hopper", lambda: False)
    wanted = jax.jit(jax.grad(call, argnums=numbers))(*inputs)
  assert_gradients_near(found, wanted, limit)


def _of_model(config):
  """Return a loss, its parameters and its tokens."""
  graph, params = model_cases.make(config)
  tokens_BT = np.arange(B * T, dtype=np.int32).reshape(B, T) % 32

  def loss(params, tokens_BT):
    logits = nnx.merge(graph, params)(tokens_BT)
    return jnp.square(logits.astype(jnp.float32)).sum()

  return loss, params, tokens_BT


@pytest.mark.parametrize(
  "dtype, limit, has_hopper",
  # On a Hopper GPU this is XLA's program too: jax does not know over which axes
  # a kernel's results vary.
  [("float32", 1e-5, False), ("bfloat16", 5e-2, True)],
)
def test_gradients_of_a_model(mesh, monkeypatch, dtype, limit, has_hopper):
  monkeypatch.setattr(devices, "is_hopper", lambda: has_hopper)
  config = dataclasses.replace(CONFIG, dtype=dtype)
  loss, *inputs = _of_model(config)
  _assert_same_gradients(loss, *inputs, whole=1, limit=limit)


@pytest.mark.parametrize(
  "mixer",
  [
    AttentionConfig(),
    HyenaConfig(length=T),
    MambaConfig(),
    ReBasedConfig(heads=2, features=8),
    RWKVConfig(),
  ],
  ids=lambda mixer: type(mixer).__name__,
)
@pytest.mark.parametrize("remat", ["none", "full"])
def test_jax_checks_every_system(mesh, mixer, remat) -> None:
  config = dataclasses.replace(CONFIG, second=mixer, remat=remat)
  loss, *inputs = _of_model(config)
  # jax raises if something varies over other axes than declared.
  run = jax.grad(_split(loss, checks=True, whole=1))
  jax.eval_shape(run, *inputs)


def test_gradients_of_the_operator_with_whole_inputs(mesh) -> None:
  """All devices have the keys and values of one row, and a state."""
  q, k, v = _qkv("float32")
  state = zero_state(1, 2, 16, 16, coefficients=BASED)
  state = jax.tree.map(lambda x: x + 1, state)

  def call(state, k, v, q):
    rows = lambda x: jnp.broadcast_to(x, (q.shape[0], *x.shape[1:]))
    o, after = polynomial_attention(
      q,
      rows(k),
      rows(v),
      coefficients=BASED,
      initial_state=jax.tree.map(rows, state),
      return_state=True,
    )
    return jnp.square(o).sum() + sum(x.sum() for x in jax.tree.leaves(after))

  inputs = state, k[:1], v[:1], q
  _assert_same_gradients(call, *inputs, whole=3, limit=1e-5)


@pytest.mark.parametrize("parts", [1, 2])
def test_gradients_of_the_loss(mesh, parts) -> None:
  rng = np.random.default_rng(0)
  embedding_VD = rng.normal(size=(32, D)).astype(np.float32)
  x_BTD = rng.normal(size=(B, T, D)).astype(np.float32)
  targets_BT = rng.integers(32, size=(B, T)).astype(np.int32)

  def call(embedding_VD, x_BTD, targets_BT):
    weights_BT = jnp.ones(targets_BT.shape, jnp.float32)
    found = (x_BTD, embedding_VD, targets_BT, weights_BT)
    return cross_entropy(*found, parts=parts)[0]

  inputs = embedding_VD, x_BTD, targets_BT
  _assert_same_gradients(call, *inputs, whole=1, limit=1e-5)


def _qkv(dtype="bfloat16"):
  rng = np.random.default_rng(0)
  shapes = [(B, T, 2, 16)] * 3
  return [rng.normal(size=s).astype(jnp.dtype(dtype)) for s in shapes]


def test_a_kernel_of_the_operator_is_refused(mesh, monkeypatch) -> None:
  monkeypatch.setattr(devices, "check_named", lambda _: None)
  call = lambda *x: polynomial_attention(*x, implementation="gpu").sum()
  with pytest.raises(NotImplementedError, match=r"\['data'\].*check_vma=False"):
    jax.eval_shape(_split(call, checks=True), *_qkv())


def test_by_default_xla_computes_it_and_says_so(mesh, monkeypatch) -> None:
  call = lambda *x: polynomial_attention(*x).astype(jnp.float32).sum()

  def both():  # compiled anew at each call
    run = _split(call, checks=True)
    return jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2)))(*_qkv())

  with warnings.catch_warnings():
    warnings.simplefilter("error")
    wanted = both()
  monkeypatch.setattr(devices, "is_hopper", lambda: True)
  monkeypatch.setattr(devices, "check_named", lambda _: None)
  monkeypatch.setattr(devices, "platform", lambda: "gpu")
  with pytest.warns(UserWarning, match="check_vma=False"):
    found = both()
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_kernel_is_taken_where_nothing_varies(mesh, hopper) -> None:
  z_BTD, b_D = np.ones((B, T, D), jnp.bfloat16), np.ones(D, np.float32)

  def has_kernel(call, *inputs, checks):
    run = _split(call, checks=checks, whole=1)
    return "gelu" in str(jax.make_jaxpr(run)(*inputs))

  call = lambda b, z: gelu(z, b).astype(jnp.float32).sum()
  assert has_kernel(call, b_D, z_BTD, checks=False)
  assert not has_kernel(call, b_D, z_BTD, checks=True)
  # z is whole, and each device has another row of the bias.
  call = lambda z, b: gelu(z, b[0]).astype(jnp.float32).sum()
  assert not has_kernel(call, z_BTD, np.ones((2, D), np.float32), checks=True)


def test_the_operator_is_refused_in_64_bits(monkeypatch) -> None:
  monkeypatch.setattr(devices, "check_named", lambda _: None)
  call = lambda *x: polynomial_attention(*x, implementation="gpu")
  refused = pytest.raises(NotImplementedError, match="jax_enable_x64")
  with jax.enable_x64(True), refused:
    jax.eval_shape(call, *_qkv())
