"""The Hopper kernels lower for CUDA on a machine without a GPU."""

import functools

import jax
from jax import ShapeDtypeStruct
import jax.numpy as jnp
import pytest

from pallas_kernels import (
  ShardAxes,
  devices,
  polynomial_attention,
  zero_state,
)
from pallas_kernels.polynomial import api, arg_specs
from pallas_kernels.polynomial.operator import Kernel

if not devices.has_mosaic_gpu():
  pytest.skip("the GPU kernels need jax ≥ 0.11", allow_module_level=True)

from pallas_kernels.polynomial.gpu import launch, passes

_EACH = {spec.name: spec for spec in arg_specs.SPECS}


def _lowered(function, *arrays) -> str:
  traced = jax.jit(function).trace(*arrays)
  return traced.lower(lowering_platforms=("cuda",)).as_text()


def _forward_and_backward(kernel, states):
  def run(q, k, v, do, state, dstate):
    o, after, kept = passes.forward(
      q, k, v, None, state, kernel, return_state=states
    )
    dq, r, dz = passes.backward_queries(q, k, v, do, None, kept, kernel)
    dk, dv, before = passes.backward_keys(
      q, k, v, do, r, dz, None, dstate, kernel, return_state=states
    )
    return o, after, dq, dk, dv, before

  return run


@pytest.mark.parametrize("name", _EACH)
def test_every_named_shape_lowers(name):
  spec = _EACH[name]
  kernel = Kernel(spec.coefficients.scaled(spec.F**-0.5), 1e-6)
  q, k, v = spec.arrays()
  passes.supports(q, v, kernel, states=False)
  run = _forward_and_backward(kernel, False)
  text = _lowered(run, q, k, v, v, None, None)
  prefixes = ("",) if spec.F <= 16 else ("part_", "pair_")
  for prefix in prefixes:
    for kernel_name in ("forward", "backward_queries", "backward_keys"):
      assert f"polynomial_{prefix}{kernel_name}" in text
  for kernel_name in ("forward", "queries", "keys"):
    assert (f"polynomial_chunk_{kernel_name}" in text) == (spec.F > 16)
  # Long rows of few heads are cut into slices, which need their states.
  cut = spec.B * spec.H * len(prefixes) <= launch.WALKS // 2
  for prefix in prefixes:
    assert (f"polynomial_{prefix}key_state" in text) == cut
    assert (f"polynomial_{prefix}query_cotangent" in text) == cut
  if spec.P % 16 == 0:
    for width in (spec.F, spec.P):
      copy = f"tensor<{spec.B}x{spec.H}x{spec.T}x{width}x"
      assert copy not in text, "a transposed copy"
    for line in text.splitlines():
      padded = "stablehlo.pad" in line and f"x{spec.T}x" in line
      assert not padded, "a padded copy"


def test_float32_runs_the_kernels_only_where_they_are_named(monkeypatch):
  monkeypatch.setattr(devices, "is_hopper", lambda: True)
  x = ShapeDtypeStruct((2, 70, 3, 16), jnp.float32)

  def traced(name):
    call = functools.partial(polynomial_attention, implementation=name)
    return str(jax.make_jaxpr(call)(x, x, x))

  assert "polynomial_forward" not in traced(None)
  text = traced("gpu")
  assert "polynomial_forward" in text
  # XLA may drop a conversion to bfloat16 and back, but not this operation.
  assert text.count("reduce_precision[") == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lm-1k", "lm-32k", "based-360m", "pile-157m"])
def test_named_shapes_lower_in_float32(name):
  spec = _EACH[name]
  kernel = Kernel(spec.coefficients.scaled(spec.F**-0.5), 1e-6)
  q, k, v = spec.arrays(jnp.float32)
  run = _forward_and_backward(kernel, False)
  text = _lowered(run, q, k, v, v, None, None)
  for kernel_name in ("forward", "backward_queries", "backward_keys"):
    assert f"polynomial_{kernel_name}" in text
  o, _, *gradients, _ = jax.eval_shape(run, q, k, v, v, None, None)
  assert o.dtype == jnp.float32
  assert all(x.dtype == jnp.float32 for x in gradients)


@pytest.mark.parametrize("T, F", [(1, 16), (63, 16), (520, 16), (1030, 24)])
def test_calls_with_states_lower(T, F):
  spec = _EACH["based-360m"]
  kernel = Kernel(spec.coefficients.scaled(0.25), 1e-6)
  q = ShapeDtypeStruct((2, T, 3, F), jnp.bfloat16)
  v = ShapeDtypeStruct((2, T, 3, 40), jnp.bfloat16)
  state = jax.eval_shape(
    lambda: zero_state(2, 3, F, 40, coefficients=spec.coefficients)
  )
  run = _forward_and_backward(kernel, True)
  text = _lowered(run, q, q, v, v, state, state)
  assert ("polynomial_backward_keys" in text) == (F == 16)
  assert ("polynomial_pair_backward_keys" in text) == (F > 16)
  shapes = jax.eval_shape(run, q, q, v, v, state, state)
  assert jax.tree.map(jnp.shape, shapes[1]) == jax.tree.map(jnp.shape, state)
  assert shapes[0].shape == v.shape and shapes[2].shape == q.shape


@pytest.mark.parametrize(
  "change, word",
  [
    (dict(F=65), "F=65"),
    (dict(P=129), "P=129"),
    (dict(dtype=jnp.float64), "float64"),
    (dict(dtype=jnp.float32, F=17), "float32 with F=17"),
    (dict(eps=0.0), "eps"),
    (dict(F=8, states=True), "states with F=8"),
  ],
)
def test_unsupported_calls_name_the_reason(change, word):
  call = dict(F=16, P=64, dtype=jnp.bfloat16, eps=1e-6, states=False)
  call |= change
  q = ShapeDtypeStruct((2, 64, 3, call["F"]), call["dtype"])
  v = ShapeDtypeStruct((2, 64, 3, call["P"]), call["dtype"])
  kernel = Kernel(arg_specs.REBASED.scaled(0.25), call["eps"])
  with pytest.raises(NotImplementedError, match=f"{word}.*'xla' does"):
    passes.supports(q, v, kernel, states=call["states"])


def test_time_over_devices_needs_states():
  """Each device passes its state on to the next one."""
  q = ShapeDtypeStruct((2, 64, 3, 8), jnp.bfloat16)
  kernel = Kernel(arg_specs.REBASED.scaled(0.25), 1e-6)
  choose = lambda axes: api._choose(
    "gpu", q, q, kernel, states=False, axes=axes
  )
  assert choose(ShardAxes(batch="data")) == "gpu"
  with pytest.raises(NotImplementedError, match=r"states with F=8.*'xla' does"):
    choose(ShardAxes(time="context"))
