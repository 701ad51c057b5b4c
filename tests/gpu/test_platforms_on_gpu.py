"""CPU arrays beside GPU arrays in one process with a Hopper GPU."""

import functools

from flax import nnx
import jax
from jax import export
import jax.numpy as jnp
import model_cases
import numpy as np
import pytest

from pallas_kernels import devices, polynomial_attention
from rebased_jax import (
  AttentionConfig,
  BaseConvConfig,
  ModelConfig,
  ReBasedConfig,
)

pytestmark = pytest.mark.gpu
if not devices.is_hopper():
  pytest.skip("no Hopper GPU", allow_module_level=True)

_TOLERANCE = 2e-2  # limit of ‖a − b‖ / ‖b‖: a few roundings of 2⁻⁹


def _cpu() -> jax.Device:
  return jax.devices("cpu")[0]


def _qkv():
  keys = jax.random.split(jax.random.key(0), 3)
  return [jax.random.normal(key, (2, 130, 3, 16), jnp.bfloat16) for key in keys]


def _gradients(*qkv, implementation=None):
  """Return o and the gradients of q, k and v."""
  call = functools.partial(polynomial_attention, implementation=implementation)
  o, pull = jax.vjp(call, *qkv)
  return o, pull(jnp.cos(o))


def _assert_near(found, wanted) -> None:
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    assert np.linalg.norm(a - b) <= _TOLERANCE * np.linalg.norm(b)


def _platforms(tree) -> set[str]:
  return {x.device.platform for x in jax.tree.leaves(tree)}


@pytest.mark.parametrize("jit", [True, False])
def test_arrays_of_both_devices(jit) -> None:
  run = jax.jit(lambda *x: _gradients(*x)) if jit else _gradients
  arrays = _qkv()
  on_gpu = run(*arrays)
  on_cpu = run(*jax.device_put(arrays, _cpu()))
  again = run(*arrays)
  assert (_platforms(on_gpu), _platforms(on_cpu)) == ({"gpu"}, {"cpu"})
  _assert_near(on_cpu, on_gpu)
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(on_gpu), strict=True):
    np.testing.assert_array_equal(a, b)
  text = run.lower(*arrays).as_text() if jit else "mosaic_gpu"
  assert "mosaic_gpu" in text


def test_the_default_device() -> None:
  with jax.default_device(_cpu()):
    found = _gradients(*jax.device_put(_qkv(), _cpu()))
    made_here = _gradients(*_qkv())
  assert _platforms((found, made_here)) == {"cpu"}
  _assert_near(found, _gradients(*_qkv()))


def test_one_artefact_runs_on_both() -> None:
  run = jax.jit(lambda *x: _gradients(*x))
  artefact = export.export(run, platforms=("cpu", "cuda"))(*_qkv())
  assert "mosaic_gpu" in artefact.mlir_module()
  on_cpu = artefact.call(*jax.device_put(_qkv(), _cpu()))
  assert _platforms(on_cpu) == {"cpu"}
  _assert_near(on_cpu, artefact.call(*_qkv()))


@pytest.mark.parametrize("first", [BaseConvConfig(), AttentionConfig(heads=8)])
def test_a_model_on_the_cpu(first) -> None:
  """cuDNN, and every kernel beside the operator, has another form there."""
  config = ModelConfig(
    first=first,
    second=ReBasedConfig(heads=2, features=16, implementation=None),
    vocab_size=1024,
    width=128,
    mlp_width=256,
    dtype="bfloat16",
  )
  graph, params = model_cases.make(config)
  tokens_BT = np.arange(2 * 70, dtype=np.int32).reshape(2, 70)

  @jax.jit
  def run(params, tokens_BT):
    def loss(params):
      logits = nnx.merge(graph, params)(tokens_BT)
      return jnp.square(logits.astype(jnp.float32)).mean()

    return jax.value_and_grad(loss)(params)

  found = run(*jax.device_put((params, tokens_BT), _cpu()))
  assert _platforms(found) == {"cpu"}
  wanted, _ = run(params, tokens_BT)
  np.testing.assert_allclose(found[0], wanted, rtol=_TOLERANCE)
