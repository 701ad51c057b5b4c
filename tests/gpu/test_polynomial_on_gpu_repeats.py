"""The Hopper kernels on a GPU: repeats, uninitialised memory, two GPUs."""

import functools

from device_memory import fill_free_memory_with_nan
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
import numpy as np
import pytest

from pallas_kernels import ShardAxes, measure, polynomial_attention
from pallas_kernels.polynomial import arg_specs
from pallas_kernels.polynomial.arg_specs import ArgSpec

pytestmark = pytest.mark.gpu
if jax.devices()[0].platform != "gpu":
  pytest.skip("no GPU", allow_module_level=True)

_EACH = {spec.name: spec for spec in arg_specs.SPECS}
_REPEATS = 1000
# Bytes that are filled with NaN: more than a case takes, and little enough that
# several test processes share a card. Each may use the whole card's memory.
_POISON = 16 << 30


def _both(spec: ArgSpec):
  """Make a function from (q, k, v, do) to o and the gradients."""
  return measure.forward_and_backward(measure.operator(spec, "gpu"))


def _same(a, b):
  """Whether two results are bit-identical, as a scalar on the device."""
  bits = lambda x: jax.lax.bitcast_convert_type(x, jnp.uint16)
  pairs = zip(a, b, strict=True)
  return functools.reduce(
    jnp.logical_and, [(bits(x) == bits(y)).all() for x, y in pairs]
  )


@pytest.mark.slow
@pytest.mark.parametrize("name", _EACH)
def test_a_thousand_runs_are_bit_identical(name):
  spec = _EACH[name]
  both = _both(spec)

  @jax.jit
  def differing(q, *rest):
    first = both(q, *rest)

    def step(_, count):
      # Depends on the last run, so that XLA cannot reuse the first result.
      again = both(jnp.where(count < 0, jnp.nan, q), *rest)
      return count + jnp.where(_same(again, first), 0, 1)

    return jax.lax.fori_loop(0, _REPEATS, step, jnp.int32(0)), first

  count, first = differing(*measure.inputs(spec))
  assert all(bool(jnp.isfinite(x).all()) for x in first)
  assert int(count) == 0


@pytest.mark.parametrize(
  "spec",
  [
    *_EACH.values(),
    ArgSpec("tail", 3, 1037, 2, 16, 64),
    ArgSpec("slices and a tail", 1, 9001, 2, 16, 24, arg_specs.BASED),
    ArgSpec("one token", 2, 1, 3, 16, 64),
  ],
  ids=lambda spec: spec.name,
)
def test_uninitialised_memory_is_not_read(spec):
  """Results go to buffers of NaN; much of the other memory is NaN, too."""
  arrays = measure.inputs(spec)
  both = _both(spec)
  clean = jax.block_until_ready(jax.jit(both)(*arrays))

  # XLA writes results to donated buffers of the same shapes.
  poisoned = jax.jit(
    lambda arrays, buffers: both(*arrays),
    donate_argnums=1,
    keep_unused=True,
  )
  poisoned = poisoned.lower(arrays, list(clean)).compile()
  for _ in range(3):
    buffers = [jnp.full(x.shape, jnp.nan, x.dtype) for x in clean]
    fill_free_memory_with_nan(_POISON)
    found = poisoned(arrays, buffers)
    assert all(x.is_deleted() for x in buffers)
    assert all(bool(jnp.isfinite(x).all()) for x in found)
    assert bool(_same(found, clean))


@pytest.mark.skipif(
  len(jax.devices()) < 2, reason="needs two GPUs, to split over them"
)
@pytest.mark.parametrize("split", ["batch", "heads"])
@pytest.mark.parametrize("B, T, exact", [(50, 256, True), (2, 8192, False)])
@pytest.mark.parametrize("names_axes", [True, False])
def test_two_gpus_equal_one(split, B, T, exact, names_axes):
  """Bit-identical without slices of time; else the slices differ."""
  spec = ArgSpec("sharded", B, T, 12, 16, 64)
  arrays = measure.inputs(spec)
  alone = jax.jit(_both(spec))(*arrays)
  mesh = jax.make_mesh(
    (2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2]
  )
  axes = ShardAxes(**{split: "x"})
  call = functools.partial(
    polynomial_attention,
    axes=axes if names_axes else None,
    implementation="gpu",
  )
  sharding = NamedSharding(mesh, axes.btx())
  with jax.set_mesh(mesh):
    placed = [jax.device_put(x, sharding) for x in arrays]
    found = jax.jit(measure.forward_and_backward(call))(*placed)
  for a, b in zip(found, alone, strict=True):
    assert a.sharding.is_equivalent_to(sharding, a.ndim)
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    if exact:
      np.testing.assert_array_equal(a, b)
    # Two sums of the same numbers in another order, rounded to 2⁻⁹ each.
    assert np.linalg.norm(a - b) <= 5e-3 * np.linalg.norm(b)
