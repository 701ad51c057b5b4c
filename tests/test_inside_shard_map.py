"""Calls inside a `jax.shard_map`, which by default checks what varies."""

import warnings

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import model_cases
import numpy as np
import pytest

from pallas_kernels import _compat, polynomial_attention
from rebased_jax import BaseConvConfig, ModelConfig, ReBasedConfig

B, T, D = 4, 8, 128
CONFIG = ModelConfig(
  conv=BaseConvConfig(),
  mixer=ReBasedConfig(heads=2, features=8, implementation="xla"),
  vocab_size=32,
  width=D,
  # Without an MLP: jax 0.12's own derivative of erf fails such checks.
)


def _split(call, *, checks: bool, whole: int = 0):
  """`call` of each device's rows; its first inputs are whole, and its sum."""

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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("has_hopper", [False, True])
def test_gradients_of_a_model(mesh, monkeypatch, dtype, has_hopper) -> None:
  config = ModelConfig(**{**vars(CONFIG), "dtype": dtype})
  graph, params = model_cases.make(config)
  tokens_BT = np.arange(B * T, dtype=np.int32).reshape(B, T) % 32

  def loss(params, tokens_BT):
    logits = nnx.merge(graph, params)(tokens_BT)
    return jnp.square(logits.astype(jnp.float32)).sum()

  wanted = jax.jit(jax.grad(loss))(params, tokens_BT)
  # On a Hopper GPU too this is XLA's program: kernels would not know.
  monkeypatch.setattr(_compat, "is_hopper", lambda: has_hopper)
  run = _split(loss, checks=True, whole=1)
  found = jax.jit(jax.grad(run))(params, tokens_BT)
  limit = 1e-5 if dtype == "float32" else 5e-2
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    assert np.linalg.norm(a - b) <= limit * np.linalg.norm(b)


def _qkv(dtype="bfloat16"):
  rng = np.random.default_rng(0)
  shapes = [(B, T, 2, 16)] * 3
  return [rng.normal(size=s).astype(jnp.dtype(dtype)) for s in shapes]


def test_a_kernel_of_the_operator_is_refused(mesh, monkeypatch) -> None:
  monkeypatch.setattr(_compat, "check_gpu", lambda: None)
  call = lambda *x: polynomial_attention(*x, implementation="gpu").sum()
  with pytest.raises(NotImplementedError, match=r"\['data'\].*check_vma=False"):
    jax.eval_shape(_split(call, checks=True), *_qkv())


def test_by_default_xla_computes_it_and_says_so(mesh, monkeypatch) -> None:
  call = lambda *x: polynomial_attention(*x).astype(jnp.float32).sum()

  def both():  # of a program of its own
    run = _split(call, checks=True)
    return jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2)))(*_qkv())

  with warnings.catch_warnings():
    warnings.simplefilter("error")
    wanted = both()
  monkeypatch.setattr(_compat, "check_gpu", lambda: None)
  monkeypatch.setattr(_compat, "platform", lambda: "gpu")
  with pytest.warns(UserWarning, match="check_vma=False"):
    found = both()
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_array_equal(a, b)


def test_unchecked_the_kernels_run(mesh, hopper) -> None:
  from rebased_jax.gelu import gelu

  z_BTD, b_D = np.ones((B, T, D), jnp.bfloat16), np.ones(D, np.float32)
  call = lambda b, z: gelu(z, b).astype(jnp.float32).sum()
  for checks in (False, True):
    run = jax.make_jaxpr(_split(call, checks=checks, whole=1))
    assert ("gelu" in str(run(b_D, z_BTD))) != checks
