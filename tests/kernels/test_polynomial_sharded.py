"""Polynomial attention over the axes of a mesh of eight devices."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
from polynomial_cases import (
  attention,
  errors,
  make_inputs,
  value_and_gradients,
)
import polynomial_oracle as po
import pytest

import pallas_kernels as pk

NAMES = ("data", "model", "sequence")
AXES = pk.ShardAxes(*NAMES)
# Where documents start in the eight rows of 160 tokens. A mesh cuts time into
# two shards of 80 tokens, or into eight of 20.
BOUNDARIES = [
  (),
  (80,),  # between shards of both meshes
  (20, 40, 60, 80, 100, 120, 140),  # between all of the eight shards
  (7, 80, 81, 90),  # between shards and within, and two in one shard
  (79, 159),  # the last token is a document
  (1, 30, 75),
  (50, 51, 52, 53, 100),
  tuple(range(1, 160)),  # each token is a document
]


def mesh_of(*shape, names=NAMES, kind=AxisType.Auto):
  types = (kind,) * len(shape)
  return jax.make_mesh(shape, names, axis_types=types)


@functools.cache
def case(coefficients, documents: bool):
  """Return inputs of B=8, T=160, H=2, F=4, P=3, and the oracle's answer."""
  x = make_inputs(
    8, 160, 2, 4, 3, coefficients=coefficients, state=True, final=True
  )
  if documents:
    starts_BT = np.zeros((8, 160), np.int32)
    for b, starts in enumerate(BOUNDARIES):
      starts_BT[b, list(starts)] = 1
    x = x._replace(ids_BT=np.cumsum(starts_BT, axis=1, dtype=np.int32) % 2)
  return x, po.oracle(x, coefficients)


@functools.partial(jax.jit, static_argnums=(1, 2))
def answer(x, coefficients, axes):
  call = attention(coefficients, implementation=None, axes=axes)
  return value_and_gradients(call, x)


def check(got, want):
  for name, error in errors(got, want).items():
    # As on one device: see test_polynomial_values.py.
    assert error <= (5e-5 if name.startswith("d") else 1e-5), (name, error)


@pytest.mark.parametrize(
  ("shape", "documents", "kind"),
  [
    ((2, 2, 2), True, AxisType.Auto),
    ((1, 1, 8), True, AxisType.Explicit),
    ((1, 1, 8), False, AxisType.Auto),
    ((2, 2, 2), True, AxisType.Explicit),
  ],
)
def test_mesh_gives_the_answer_of_one_device(shape, documents, kind):
  """Values, gradients and states are right, and lie split over the mesh."""
  numbers, coefficients = (po.BASED, pk.BASED)
  if shape == (1, 1, 8):
    numbers, coefficients = (po.REBASED, pk.REBASED)
  x, want = case(numbers, documents)
  mesh = mesh_of(*shape, kind=kind)
  with jax.set_mesh(mesh):
    got = answer(x, coefficients, AXES)
  check(got, want)
  time_first = NamedSharding(mesh, PartitionSpec("data", "sequence", "model"))
  for name in ("o", "dq", "dk", "dv"):
    y = getattr(got, name)
    assert y.sharding.is_equivalent_to(time_first, 4), (name, y.sharding)
    assert {s.data.size for s in y.addressable_shards} == {y.size // 8}
  of_state = NamedSharding(mesh, PartitionSpec("data", "model"))
  for y in (*got.after, *got.dstate):
    assert y.sharding.is_equivalent_to(of_state, 4), y.sharding


def test_time_split_by_two_axes_without_states():
  """There is no initial state, and none is returned."""
  x, _ = case(po.REBASED, True)
  x = x._replace(state=None, dafter=None)
  want = po.oracle(x, po.REBASED)
  axes = pk.ShardAxes(time=("a", "b"))

  call = attention(implementation=None, return_state=False, axes=axes)

  with jax.set_mesh(mesh_of(2, 4, names=("a", "b"))):
    check(jax.jit(functools.partial(value_and_gradients, call))(x), want)


def test_inf_stays_in_its_document_across_devices():
  """The document ends within another device's shard."""
  x, _ = case(po.REBASED, True)
  v = x.v_BTHP.copy()
  v[3, 10, 0, 1] = np.inf  # in the document of tokens 7 … 79
  with jax.set_mesh(mesh_of(1, 1, 8)):
    clean = answer(x, pk.REBASED, AXES)
    got = answer(x._replace(v_BTHP=v), pk.REBASED, AXES)
  for name in ("o", "dq", "dk", "dv"):
    a, b = np.array(getattr(got, name)), np.array(getattr(clean, name))
    a[3, 7:80], b[3, 7:80] = 0, 0
    assert a.tobytes() == b.tobytes(), name
  assert not np.isfinite(np.asarray(got.o)[3, 10:80, 0]).all(axis=-1).any()


def test_axes_without_a_mesh_are_refused():
  with pytest.raises(ValueError, match=r"axes=.*no mesh.*jax\.set_mesh"):
    attend_shapes(pk.ShardAxes(time="sequence"))


@pytest.mark.parametrize(
  ("axes", "message"),
  [
    (pk.ShardAxes(heads="ghost"), r"axes\.heads='ghost'.*not 'ghost'"),
    (pk.ShardAxes(time=("model", "x")), r"axes\.time=\('model', 'x'\).*'x'"),
    (pk.ShardAxes(batch="data"), r"axes\.batch='data' splits 3 .* of 2"),
    (pk.ShardAxes(heads="model"), r"axes\.heads='model' splits 5 .* of 2"),
    (
      pk.ShardAxes(time=("model", "sequence")),
      r"axes\.time=\('model', 'sequence'\) splits 6 .* multiple of 4",
    ),
    (
      pk.ShardAxes(time=("sequence", "sequence")),
      r"axes=.* uses the mesh axis 'sequence' twice",
    ),
  ],
  ids=lambda x: str(x)[:30],
)
def test_axes_that_do_not_fit_are_named(axes, message):
  with jax.set_mesh(mesh_of(2, 2, 2)), pytest.raises(ValueError, match=message):
    attend_shapes(axes)


def attend_shapes(axes):
  """Call with shapes instead of arrays: B=3, T=6, H=5."""
  x = jax.ShapeDtypeStruct((3, 6, 5, 4), jnp.float32)
  jax.eval_shape(functools.partial(pk.polynomial_attention, axes=axes), x, x, x)
