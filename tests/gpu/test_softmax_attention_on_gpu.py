"""Softmax attention by cuDNN on a GPU, against XLA."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rebased_jax import AttentionConfig
from rebased_jax.mixers import base

pytestmark = pytest.mark.gpu
if jax.devices()[0].platform != "gpu":
  pytest.skip("no GPU", allow_module_level=True)

_TOLERANCE = 1e-2  # limit of ‖a − b‖ / ‖b‖: a few roundings of 2⁻⁹


def _all(implementation, x_BTD, rotary=False, positions_BM=None):
  """Return y and the gradients of the parameters and x."""
  config = AttentionConfig(
    heads=4, rotary=rotary, implementation=implementation
  )
  site = base.Site(x_BTD.shape[-1], dtype="bfloat16")
  graph, params = nnx.split(config.make(site, rngs=nnx.Rngs(0)))
  params = jax.tree.map(lambda p: 5 * p, params)

  def call(params, x_BTD):
    return nnx.merge(graph, params)(x_BTD, query_positions=positions_BM)

  def run(params, x_BTD):
    y, pull = jax.vjp(call, params, x_BTD)
    return y, pull(jnp.cos(y))

  hlo = jax.jit(run).lower(params, x_BTD).as_text()
  assert ("cudnn" in hlo) == (implementation != "xla")
  return jax.jit(run)(params, x_BTD)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("implementation", ["cudnn", None])
@pytest.mark.parametrize(("T", "M"), [(128, None), (77, None), (128, 9)])
def test_cudnn_is_chosen_and_equals_xla(T, M, implementation, rotary) -> None:
  x_BTD = jax.random.normal(jax.random.key(0), (3, T, 128), jnp.bfloat16)
  positions = None
  if M is not None:
    positions = jax.random.randint(jax.random.key(1), (3, M), 0, T)
  found, wanted = (
    jax.tree.leaves(_all(name, x_BTD, rotary, positions))
    for name in (implementation, "xla")
  )
  for x, y in zip(found, wanted, strict=True):
    x, y = (np.asarray(a, np.float32) for a in (x, y))
    assert np.linalg.norm(x - y) <= _TOLERANCE * np.linalg.norm(y)


def test_calls_that_cudnn_cannot_do_run_xla() -> None:
  for width, dtype in ((128, "float32"), (4 * 12, "bfloat16")):
    site = base.Site(width, dtype=dtype)
    x_BTD = jnp.ones((1, 16, width), dtype)
    named, free = (
      AttentionConfig(heads=4, implementation=name).make(site, rngs=nnx.Rngs(0))
      for name in ("cudnn", None)
    )
    assert np.isfinite(free(x_BTD)).all()
    with pytest.raises(NotImplementedError, match="needs"):
      named(x_BTD)
