"""Every operator under a mesh with Explicit axes, as jax.make_mesh makes it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import devices
from pallas_kernels.gated_conv.operator import has_kernel as conv_has_kernel
from pallas_kernels.gelu.operator import has_kernel as gelu_has_kernel
from pallas_kernels.layer_norm.operator import has_kernel as norm_has_kernel

B, T, H, F, D = 4, 130, 2, 3, 8  # T takes several chunks, the last one short
ROWS = ("data", None, None, None)
HEADS = ("data", None, "tensor", None)
TIME = (None, "data", "tensor", None)


def _normal(*shape: int) -> jax.Array:
  key = jax.random.key(sum(i * n for i, n in enumerate(shape, 1)))
  return jax.random.normal(key, shape)


def _ids() -> jax.Array:
  return jnp.sort(jax.random.randint(jax.random.key(1), (B, T), 0, 5), axis=1)


class Case(NamedTuple):
  """A call, and the letters of its array arguments' axes."""

  call: Callable[..., Any]
  arrays: tuple[jax.Array, ...]
  letters: tuple[str, ...]
  outputs: Any  # the letters of the results' axes, a tree


def _attention(q, k, v, segment_ids=None, state=None, **options):
  return pk.polynomial_attention(
    q, k, v, segment_ids=segment_ids, initial_state=state, **options
  )


def _qkv() -> tuple[jax.Array, ...]:
  return _normal(B, T, H, F), _normal(B, T, H, F), _normal(B, T, H, 5)


_QKV = ("BTHF", "BTHF", "BTHP")
_PARAMETERS = (_normal(D), _normal(D))
CASES = {
  "attention": Case(_attention, _qkv(), _QKV, "BTHP"),
  "attention, documents": Case(
    _attention, (*_qkv(), _ids()), (*_QKV, "BT"), "BTHP"
  ),
  "attention, states": Case(
    lambda q, k, v, kv, kk: _attention(
      q, k, v, state=pk.State(kv, kk), return_state=True
    ),
    (
      *_qkv(),
      *(abs(x) + 1 for x in (_normal(B, H, 6, 5), _normal(B, H, 3, 3))),
    ),
    (*_QKV, "BHEP", "BHGG"),
    ("BTHP", ("BHEP", "BHGG")),
  ),
  "attention step": Case(
    lambda q, k, v, kv, kk: pk.polynomial_attention_step(
      pk.State(kv, kk), q, k, v
    ),
    (
      *(x[:, 0] for x in _qkv()),
      abs(_normal(B, H, 6, 5)) + 1,
      abs(_normal(B, H, 3, 3)) + 1,
    ),
    ("BHF", "BHF", "BHP", "BHEP", "BHGG"),
    ("BHP", ("BHEP", "BHGG")),
  ),
  "attention at": Case(
    lambda q, k, v: pk.polynomial_attention_at(
      q, k, v, jnp.array([[5, 9, 80]] * B)
    ),
    (_normal(B, 3, H, F), *_qkv()[1:]),
    ("BMHF", "BTHF", "BTHP"),
    "BMHP",
  ),
  "attention weights": Case(
    pk.polynomial_attention_weights, _qkv()[:2], _QKV[:2], "BHTS"
  ),
  "layer norm": Case(
    pk.layer_norm, (_normal(B, T, D), *_PARAMETERS), ("BTD", "D", "D"), "BTD"
  ),
  "add layer norm": Case(
    pk.add_layer_norm,
    (_normal(B, T, D), _normal(B, T, D), *_PARAMETERS),
    ("BTD", "BTD", "D", "D"),
    ("BTD", "BTD"),
  ),
  "gelu": Case(pk.gelu, (_normal(B, T, D), _normal(D)), ("BTD", "D"), "BTD"),
  "gated conv": Case(
    pk.gated_conv,
    (_normal(B, T, D), _normal(B, T, D), _normal(3, D), _normal(D)),
    ("BTD", "BTD", "KD", "D"),
    "BTD",
  ),
  "causal conv": Case(
    pk.causal_conv,
    (_normal(B, T, D), _normal(3, D), _normal(D)),
    ("BTD", "KD", "D"),
    ("BTD", "BKD"),
  ),
  "cross entropy": Case(
    lambda x, e: pk.cross_entropy(x, e, jnp.ones((B, T), jnp.int32)),
    (_normal(B, T, D), _normal(11, D)),
    ("BTD", "VD"),
    ("", ("BT", "BT")),
  ),
  "cross entropy, parts": Case(
    lambda x, e: pk.cross_entropy(x, e, jnp.ones((B, T), jnp.int32), parts=5),
    (_normal(B, T, D), _normal(11, D)),
    ("BTD", "VD"),
    ("", ("BT", "BT")),
  ),
  "selective scan": Case(
    pk.selective_scan,
    (
      _normal(B, T, D),
      abs(_normal(B, T, D)),
      -abs(_normal(D, 3)),
      _normal(B, T, 3),
      _normal(B, T, 3),
    ),
    ("BTD", "BTD", "DN", "BTN", "BTN"),
    ("BTD", "BDN"),
  ),
  "wkv": Case(
    pk.wkv,
    (_normal(B, T, D), _normal(B, T, D), -abs(_normal(D)), _normal(D)),
    ("BTD", "BTD", "D", "D"),
    ("BTD", ("BD", "BD", "BD")),
  ),
  "document runs": Case(pk.document_runs, (_ids(),), ("BT",), "BT"),
}
NO_TIME = ("selective scan", "wkv", "attention step", "attention at")
LAYOUTS = {"rows": {"B": "data"}, "heads": {"B": "data", "H": "tensor"}} | {
  "channels": {"B": "data", "D": "tensor"},
  "time": {"T": "data"},
}


def _pairs() -> list[tuple[str, str]]:
  """Return the pairs of a case and a layout that can be."""
  found = []
  for name, case in CASES.items():
    letters = "".join(case.letters)
    for layout in LAYOUTS:
      if layout == "heads" and "H" not in letters:
        continue
      if layout == "channels" and case.letters[0] != "BTD":
        continue
      if layout == "time" and name in NO_TIME:
        continue
      found.append((name, layout))
  return found


def _spec(text: str, split: dict[str, str]) -> P:
  return P(*(split.get(letter) for letter in text))


@pytest.fixture
def mesh():
  # jax's default: every axis is Explicit.
  mesh = jax.make_mesh((2, 2), ("data", "tensor"))
  if AxisType.Explicit not in mesh.axis_types:
    mesh = jax.make_mesh(
      (2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2
    )
  return mesh


@pytest.mark.parametrize(("name", "layout"), _pairs())
def test_values_types_and_gradients(mesh, name, layout):
  case, split = CASES[name], LAYOUTS[layout]
  floats = [
    i
    for i, x in enumerate(case.arrays)
    if jnp.issubdtype(x.dtype, jnp.floating)
  ]

  def loss(*arrays):
    leaves = jax.tree.leaves(case.call(*arrays))
    return sum((x.astype(jnp.float32) ** 2).sum() for x in leaves)

  def run(arrays):
    out = jax.jit(case.call)(*arrays)
    grads = jax.jit(jax.grad(loss, argnums=floats))(*arrays) if floats else ()
    return out, grads

  wanted = run(case.arrays)
  with jax.set_mesh(mesh):
    arrays = [
      jax.device_put(x, NamedSharding(mesh, _spec(text, split)))
      for x, text in zip(case.arrays, case.letters, strict=True)
    ]
    found = run(arrays)
    # An operator outside jit is itself compiled.
    eager = case.call(*arrays) if layout == "rows" else found[0]
  out, grads = found
  specs = jax.tree.leaves(case.outputs)
  for result in (out, eager):
    for x, text in zip(jax.tree.leaves(result), specs, strict=True):
      assert x.sharding.is_equivalent_to(
        NamedSharding(mesh, _spec(text, split)), x.ndim
      )
  for grad, index in zip(grads, floats, strict=True):
    assert grad.sharding.is_equivalent_to(arrays[index].sharding, grad.ndim)
  chex.assert_trees_all_close(
    jax.device_get((found, eager)),
    jax.device_get((wanted, wanted[0])),
    rtol=1e-4,
    atol=1e-4 * max(1.0, *(float(np.abs(x).max()) for x in grads))
    if grads
    else 0,
  )


def _auto_mesh():
  return jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))


def test_axes_that_are_given_split_the_result(mesh):
  """Also where the arrays are whole."""
  axes = pk.ShardAxes(batch="data", time="tensor")
  x_BTD = jnp.ones((B, 2, D))
  with jax.set_mesh(mesh):
    y_BTD = jax.eval_shape(lambda x_BTD: pk.gelu(x_BTD, axes=axes), x_BTD)
  assert y_BTD.sharding.spec == P("data", "tensor", None)


def test_no_kernel_runs_whole_on_each_device(hopper, monkeypatch):
  monkeypatch.setattr(devices, "platform", lambda: "gpu")
  x = _normal(B, T, 128).astype(jnp.bfloat16)
  wide = x.astype(jnp.float32)
  qkv = [y.astype(jnp.bfloat16) for y in _qkv()]
  taken = {
    "gelu": lambda axes: gelu_has_kernel(x, axes=axes),
    "layer norm": lambda axes: norm_has_kernel(wide, x, axes=axes),
    "conv": lambda axes: conv_has_kernel(x, 3, axes=axes),
  }
  with jax.set_mesh(_auto_mesh()):
    for has_kernel in taken.values():
      assert has_kernel(pk.ShardAxes(batch="data"))
      assert not has_kernel(None)
    with pytest.raises(NotImplementedError, match=r"\('data',\) are Auto"):
      pk.polynomial_attention(*qkv, implementation="tpu")
  assert all(has_kernel(None) for has_kernel in taken.values())
