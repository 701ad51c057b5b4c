"""Calls outside `jax.jit` compile nothing after the first, nor do gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.compile_once import keep_programs

_COMPILED = []


def _note(event: str, duration: float, **_) -> None:
  del duration
  if event == "/jax/core/compile/backend_compile_duration":
    _COMPILED.append(event)


jax.monitoring.register_event_duration_secs_listener(_note)

B, T, D, N = 2, 130, 4, 3  # several chunks of every operator


def draw(*shape):
  return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


QKV = draw(B, T, 1, D)
X, ROW, TAPS, BTN = draw(B, T, D), draw(D), draw(3, D), draw(B, T, N)
A = -(draw(D, N) ** 2)
IDS = jnp.asarray(np.arange(B * T).reshape(B, T) // 9)
STATE = jax.tree.map(jnp.ones_like, pk.zero_state(B, 1, D, D))


def loss(x, embedding, parts=1):
  return pk.cross_entropy(x, embedding, IDS % 3, parts=parts)[0]


CALLS = {
  "attention": (pk.polynomial_attention, (QKV, QKV, QKV)),
  "documents and states": (
    lambda q, k, v, state: pk.polynomial_attention(
      q, k, v, segment_ids=IDS, initial_state=state, return_state=True
    ),
    (QKV, QKV, QKV, STATE),
  ),
  "reference": (
    lambda q: pk.polynomial_attention(q, q, q, implementation="reference"),
    (QKV,),
  ),
  "step": (
    pk.polynomial_attention_step,
    (STATE, QKV[:, 0], QKV[:, 0], QKV[:, 0]),
  ),
  "at": (lambda q: pk.polynomial_attention_at(q, q, q, IDS * 0), (QKV,)),
  "weights": (pk.polynomial_attention_weights, (QKV, QKV)),
  "layer_norm": (pk.layer_norm, (X, ROW, ROW)),
  "add_layer_norm": (pk.add_layer_norm, (X, X, ROW, ROW)),
  "gelu": (pk.gelu, (X, ROW)),
  "gated_conv": (pk.gated_conv, (X, X, TAPS, ROW)),
  "causal_conv": (pk.causal_conv, (X, TAPS, ROW)),
  "loss": (loss, (X, TAPS)),
  "loss in parts": (lambda *x: loss(*x, parts=2), (X, TAPS)),
  "selective_scan": (
    lambda *x: pk.selective_scan(*x, segment_ids=IDS),
    (X, X**2, A, BTN, BTN),
  ),
  "wkv": (pk.wkv, (X, X, -(ROW**2), ROW)),
  "wkv_step": (
    pk.wkv_step,
    (X[:, 0], X[:, 0], ROW, ROW, pk.empty_wkv_state((B, D))),
  ),
}


def count_compilations(call) -> int:
  """Run the call three times; return what the third compiles."""
  for _ in range(3):
    _COMPILED.clear()
    jax.block_until_ready(call())
  return len(_COMPILED)


def gradients(call, arrays):
  outputs, pull = jax.vjp(call, *arrays)
  return pull(outputs)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_and_its_gradients_compile_once(name):
  call, arrays = CALLS[name]
  assert count_compilations(lambda: call(*arrays)) == 0
  assert count_compilations(lambda: gradients(call, arrays)) == 0


def test_the_count_notices_a_compilation():
  """A new function at each call is compiled at each call."""
  fresh = lambda: jax.lax.scan(lambda x, _: (x + 1, None), 0, None, length=3)
  assert count_compilations(fresh) > 0


def test_a_mesh_compiles_once():
  mesh = jax.make_mesh((2,), ("t",), (jax.sharding.AxisType.Auto,))
  axes = pk.ShardAxes(time="t")
  calls = {
    "attention": lambda q: pk.polynomial_attention(q, q, q, axes=axes),
    "loss": lambda q: pk.cross_entropy(
      q[:, :, 0], TAPS, IDS % 3, parts=5, axes=axes
    )[0],
  }
  with jax.set_mesh(mesh):
    for call in calls.values():
      assert count_compilations(lambda call=call: call(QKV)) == 0
      grads = lambda call=call: gradients(call, (QKV,))
      assert count_compilations(grads) == 0


def test_the_last_programs_are_kept() -> None:
  made = []

  @keep_programs(most=2)
  def make(*key):
    made.append(key)
    return key

  for key in ("a", "b", "a", "c", "a", "b"):  # "c" drops "b"
    assert make(key) == (key,)
  assert made == [("a",), ("b",), ("c",), ("b",)]
  # A list has no hash: the function works, and nothing is kept.
  assert make(["d"]) == make(["d"]) == (["d"],)
  assert len(made) == 6
