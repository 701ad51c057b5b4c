"""The TPU kernels compile for TPUs, by libtpu, on a machine without one.

The whole compiler runs, with Mosaic; nothing is computed. Run this file alone,
with `JAX_PLATFORMS=cpu`.
"""

import importlib.util
import math
import re

from flax import nnx
import jax
from jax import ShapeDtypeStruct
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np
import pytest

from pallas_kernels import BASED, ShardAxes, devices, zero_state
from pallas_kernels.polynomial import arg_specs
from pallas_kernels.polynomial.operator import Kernel
from pallas_kernels.polynomial.tpu import passes as tpu
from rebased_jax import Based, BasedConfig, ReBased, ReBasedConfig

if importlib.util.find_spec("libtpu") is None:
  pytest.skip("no libtpu: pip install libtpu", allow_module_level=True)
if jax.config.jax_platforms != "cpu":
  pytest.skip(
    "libtpu would look for a TPU: run it alone, with JAX_PLATFORMS=cpu",
    allow_module_level=True,
  )

GENERATIONS = ("v5e", "v5p", "v6e")
EACH = {spec.name: spec for spec in arg_specs.SPECS}


def mesh_of(generation: str, *shape: int) -> Mesh:
  """Return a mesh (data, model) of devices that libtpu describes."""
  chips = devices.tpu_topology(generation)[: math.prod(shape)]
  return Mesh(
    np.array(chips).reshape(shape),
    ("data", "model"),
    axis_types=(AxisType.Auto,) * 2,
  )


def compiled(mesh: Mesh, function, *arrays) -> str:
  """Return the optimised HLO; arrays without a sharding are replicated."""
  everywhere = NamedSharding(mesh, PartitionSpec())
  arrays = jax.tree.map(
    lambda x: ShapeDtypeStruct(
      x.shape, x.dtype, sharding=x.sharding or everywhere
    ),
    arrays,
  )
  with jax.set_mesh(mesh):
    return jax.jit(function).lower(*arrays).compile().as_text()


def passes(kernel: Kernel, states: bool):
  def run(q, k, v, do, runs, state, dstate):
    o, after, before = tpu.forward(
      q, k, v, runs, state, kernel, return_state=states
    )
    dq, r, dz = tpu.backward_queries(q, k, v, do, runs, before, kernel)
    dk, dv, dbefore = tpu.backward_keys(
      q, k, v, do, r, dz, runs, dstate, kernel, return_state=states
    )
    return o, after, dq, dk, dv, dbefore

  return run


def kernel_of(spec) -> Kernel:
  return Kernel(spec.coefficients.scaled(spec.F**-0.5), 1e-6)


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_spec_compiles(generation, name):
  spec = EACH[name]
  q, k, v = spec.arrays()
  run = passes(kernel_of(spec), False)
  hlo = compiled(mesh_of(generation, 1, 1), run, q, k, v, v, None, None, None)
  for kernel in ("forward", "backward_queries", "backward_keys"):
    assert f"polynomial_{kernel}" in hlo


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(
  ("F", "P", "H", "dtype"),
  [
    (8, 1, 3, jnp.bfloat16),
    (16, 128, 3, jnp.float32),
    (32, 40, 3, jnp.bfloat16),
    (64, 64, 3, jnp.bfloat16),
    # Cases that fill VMEM: many heads in a step, wide rows.
    (16, 5, 25, jnp.bfloat16),
    (64, 1, 12, jnp.bfloat16),
    (64, 128, 1, jnp.float32),
  ],
)
def test_states_documents_and_tails_compile(generation, F, P, H, dtype):
  B, T = 2, 9000  # several blocks and a tail
  q = ShapeDtypeStruct((B, T, H, F), dtype)
  v = ShapeDtypeStruct((B, T, H, P), dtype)
  runs = ShapeDtypeStruct((B, T), jnp.int32)
  state = jax.eval_shape(lambda: zero_state(B, H, F, P, coefficients=BASED))
  run = passes(Kernel(BASED.scaled(F**-0.5), 1e-6), True)
  mesh = mesh_of(generation, 1, 1)
  hlo = compiled(mesh, run, q, q, v, v, runs, state, state)
  assert "polynomial_backward_keys" in hlo


# Inside a training step.


def training_step(spec, mesh: Mesh):
  """Make a step of SGD through a mixer under jax.checkpoint, and its arguments.

  Batch and heads are split; where there is a single row, heads and time are.
  """
  based = spec.coefficients == BASED
  make, config = (Based, BasedConfig) if based else (ReBased, ReBasedConfig)
  config = config(heads=spec.H, features=spec.F, value_features=spec.P)
  width = 768
  graph, params = nnx.split(
    nnx.eval_shape(
      lambda: make(width, config, dtype="bfloat16", rngs=nnx.Rngs(0))
    )
  )
  many = spec.B > 1
  axes = (
    ShardAxes("data", "model") if many else ShardAxes(None, "model", "data")
  )

  def loss(params, x_BTD):
    layer = lambda params, x: nnx.merge(graph, params)(x, axes=axes)
    x_BTD = x_BTD + jax.checkpoint(layer)(params, x_BTD)
    return jnp.square(x_BTD.astype(jnp.float32)).mean()

  def step(params, x_BTD):
    grads = jax.grad(loss)(params, x_BTD)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

  def place(path, p):
    name = jax.tree_util.keystr(path)
    split = PartitionSpec()
    if "project" in name:
      out = "'o'" in name
      split = PartitionSpec("model") if out else PartitionSpec(None, "model")
    sharding = NamedSharding(mesh, split)
    return ShapeDtypeStruct(p.shape, p.dtype, sharding=sharding)

  rows = NamedSharding(mesh, axes.bt())
  x = ShapeDtypeStruct((spec.B, spec.T, width), jnp.bfloat16, sharding=rows)
  return step, (jax.tree_util.tree_map_with_path(place, params), x)


_MOVES = {"transpose", "copy", "pad", "reshape", "slice", "concatenate"}
_LINE = re.compile(r"\s*(?:ROOT )?%?\S+ = (.+?) ([\w-]+)\((.*)")
_NO_WORK = {"parameter", "bitcast", "constant", "tuple"}


def largest(result: str) -> int:
  """Count the elements of an instruction's result, or of its largest one."""
  shapes = re.findall(r"\w+\[([\d,]*)\]", result)
  sizes = (math.prod(int(d) for d in x.split(",") if d) for x in shapes)
  return max(sizes, default=0)


def moved_arrays(hlo: str, least: int) -> list[str]:
  """Find instructions that only move an array of at least `least` elements.

  They stand alone, or are fused with other moves only. An asynchronous copy
  between HBM and VMEM does not count, because it keeps the layout.
  """
  bodies, found = {}, []
  for block in re.split(r"\n\n|\n(?=%|ENTRY)", hlo):
    name = re.match(r"(?:ENTRY )?%?([\w.-]+) ", block)
    lines = [m for m in map(_LINE.match, block.splitlines()) if m]
    if name:
      bodies[name[1]] = lines
  only_moves = {
    name
    for name, lines in bodies.items()
    if {m[2] for m in lines} & _MOVES
    and {m[2] for m in lines} <= _MOVES | _NO_WORK
  }
  for name, lines in bodies.items():
    if name.startswith(("fused", "bitcast_fusion")) or "fused" in name:
      continue
    for m in lines:
      called = re.search(r"calls=%?([\w.-]+)", m[3])
      moves = m[2] in _MOVES or (called and called[1] in only_moves)
      if moves and largest(m[1]) >= least:
        found.append(m[0].strip()[:200])
  return found


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_training_step_compiles_and_moves_no_array(generation, name):
  spec = EACH[name]
  mesh = mesh_of(generation, 2, 2)
  step, arrays = training_step(spec, mesh)
  hlo = compiled(mesh, step, *arrays)
  for kernel in ("forward", "backward_queries", "backward_keys"):
    assert f"polynomial_{kernel}" in hlo
  least = spec.B * spec.T * spec.H * min(spec.F, spec.P) // 4
  moved = moved_arrays(hlo, least)
  assert not moved, "\n".join(moved)


def test_moved_arrays_finds_a_transpose():
  mesh = mesh_of("v5e", 1, 1)
  x = ShapeDtypeStruct((4, 512, 256), jnp.bfloat16)
  assert moved_arrays(compiled(mesh, lambda x: x.transpose(0, 2, 1), x), x.size)
  assert not moved_arrays(compiled(mesh, lambda x: x + 1, x), x.size)
