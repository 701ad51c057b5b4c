"""Kernels under a mesh whose Auto axes nobody assigned.

XLA's own passes stand in for the Hopper kernels, which a CPU cannot run.
"""

import functools
import types

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import devices
from pallas_kernels.polynomial import api, xla

B, T, H, F, V = 4, 3, 2, 8, 5
_PASSES = "forward", "key_state", "backward_queries", "backward_keys"


@pytest.fixture
def shapes(monkeypatch) -> set[tuple[int, ...]]:
  """Make "gpu" run XLA's passes on CPUs; collect the shapes of their q or k."""
  seen = set()

  def spy(name):
    def run(first, *rest, **options):
      seen.add(first.shape)
      return getattr(xla.CHUNKS, name)(first, *rest, **options)

    return run

  passes = types.ModuleType("passes")
  passes.supports = lambda *_, **__: None
  for name in _PASSES:
    setattr(passes, name, spy(name))
  monkeypatch.setattr(api, "_kernels", lambda _: passes)
  monkeypatch.setattr(devices, "check_named", lambda _: None)
  monkeypatch.setitem(devices.KERNEL_PLATFORMS, "gpu", ("cuda", "cpu"))
  return seen


def _mesh():
  names = ("data", "model")
  return jax.make_mesh((2, 2), names, axis_types=(AxisType.Auto,) * 2)


def _arrays():
  rng = np.random.default_rng(0)
  sizes = (F, F, V)
  qkv = [rng.normal(size=(B, T, H, X)).astype(np.float32) for X in sizes]
  state = jax.tree.map(lambda x: x + 1, pk.zero_state(B, H, F, V))
  ids = np.array([[0, 0, 0], [0, 0, 1], [1, 2, 2], [3, 3, 3]])
  return *qkv, state, ids


def _gradients(q, k, v, state, ids, implementation="gpu"):
  def loss(q, k, v, state):
    o, after = pk.polynomial_attention(
      q,
      k,
      v,
      segment_ids=ids,
      initial_state=state,
      return_state=True,
      implementation=implementation,
    )
    return jnp.square(o).sum() + sum(x.sum() for x in after)

  return jax.grad(loss, argnums=(0, 1, 2, 3))(q, k, v, state)


def _assert_near(found, wanted) -> None:
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_each_device_runs_its_rows_and_heads(shapes) -> None:
  arrays = _arrays()
  by_xla = jax.jit(functools.partial(_gradients, implementation="xla"))
  wanted = by_xla(*arrays)
  mesh = _mesh()

  def put(x, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))

  q, k, v, state, ids = arrays
  with jax.set_mesh(mesh):
    qkv = [put(x, "data", None, "model") for x in (q, k, v)]
    state, ids = put(state, "data", "model"), put(ids, "data")
    lowered = jax.jit(_gradients).lower(*qkv, state, ids)
    shapes.clear()
    compiled = lowered.compile()
    found = compiled(*qkv, state, ids)
  assert shapes == {(B // 2, T, H // 2, F)}
  assert "all-gather" not in compiled.as_text()
  assert found[0].sharding.spec == P("data", None, "model")
  assert found[3].kk_BHGG.sharding.spec == P("data", "model")
  _assert_near(found, wanted)


def test_mapped_calls_and_rows_that_do_not_divide(shapes) -> None:
  q, k, v, _, _ = (x[:3] if hasattr(x, "shape") else x for x in _arrays())
  mesh = _mesh()
  call = functools.partial(pk.polynomial_attention, implementation="gpu")
  each = jax.vmap(call, (0, None, 0))
  wanted = call(q, k, v, implementation="xla")
  with jax.set_mesh(mesh):
    q, k, v = (
      jax.device_put(x, NamedSharding(mesh, P(None, None, "model")))
      for x in (q, k, v)
    )
    twice = jax.jit(each)(jnp.stack([q, q]), k, jnp.stack([v, -v]))
  _assert_near(twice, np.stack([wanted, -wanted]))
  assert (6, T, H // 2, F) in shapes


def test_a_program_for_devices_of_no_mesh(shapes, monkeypatch) -> None:
  """No mesh says what they split, so no kernel runs."""
  everywhere = NamedSharding(_mesh(), P("data"))
  # float32 takes the kernels only where they are named.
  q, k, v = (x.astype(jnp.bfloat16) for x in _arrays()[:3])
  qkv = jax.device_put((q, k, v), everywhere)
  call = functools.partial(pk.polynomial_attention, implementation="gpu")
  with pytest.raises(NotImplementedError, match="for 4 devices.*set_mesh"):
    jax.jit(call)(*qkv)
  monkeypatch.setattr(devices, "is_hopper", lambda: True)
  with pytest.warns(UserWarning, match="XLA's program runs.*for 4 devices"):
    found = jax.jit(lambda *x: pk.polynomial_attention(*x))(*qkv)
  _assert_near(found, call(q, k, v, implementation="xla"))


def test_inside_a_map_over_some_axes(shapes) -> None:
  """The other axes are left to XLA, which could split nothing."""
  call = functools.partial(pk.polynomial_attention, implementation="gpu")
  some = jax.shard_map(
    call,
    in_specs=P("data"),
    out_specs=P("data"),
    axis_names={"data"},
    check_vma=False,
  )
  refused = pytest.raises(NotImplementedError, match=r"\('model',\) are Auto")
  with jax.set_mesh(_mesh()), refused:
    jax.eval_shape(some, *_arrays()[:3])
