"""The grid of the TPU kernels, the blocks of their arrays, and the launch.

The grid is (batch, groups of heads, blocks of time). The last axis is run in
order: the recurrent state stays in VMEM from block to block of a row.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.polynomial.tpu.call import Call

# The kernel's references by name; an argument that a call has not is missing.
Refs = dict[str, Any]
StateSizes = tuple[tuple[int, int], tuple[int, int]]  # of KV and KK
Input = tuple[Array, pl.BlockSpec]
Output = tuple[jax.ShapeDtypeStruct, pl.BlockSpec]


def time_block(call: Call, *, reverse: bool) -> Callable[[Any], Any]:
  """Return the map from a step of the grid to its block of time."""

  def block(step):
    return call.steps - 1 - step if reverse else step

  return block


def token_spec(rows: int, call: Call, *, reverse: bool = False) -> pl.BlockSpec:
  """Return the blocks of a (B, H·rows, T) array.

  The rows of a head need not be whole tiles; those of a step's heads are.
  """
  block = time_block(call, reverse=reverse)
  return pl.BlockSpec(
    (None, call.heads * rows, call.block), lambda b, h, t: (b, h, block(t))
  )


def starts_spec(call: Call, *, reverse: bool = False) -> pl.BlockSpec:
  """Return the blocks of the (B, 1, T) positions where documents start."""
  block = time_block(call, reverse=reverse)
  return pl.BlockSpec((None, 1, call.block), lambda b, h, t: (b, 0, block(t)))


def scalar_spec(call: Call, *, reverse: bool = False) -> pl.BlockSpec:
  """Return the blocks of a (B, H, 1, T) array, one number a token and head."""
  block = time_block(call, reverse=reverse)
  return pl.BlockSpec(
    (None, call.heads, 1, call.block), lambda b, h, t: (b, h, 0, block(t))
  )


def state_spec(size: tuple[int, int], call: Call) -> pl.BlockSpec:
  """Return the blocks of a (B, H, ·, ·) array, alike at all steps of time."""
  return pl.BlockSpec((None, call.heads, *size), lambda b, h, t: (b, h, 0, 0))


def initial_state(
  state: tuple[Array, Array] | None, sizes: StateSizes, call: Call
) -> dict[str, Input]:
  """Return the inputs from which the state starts; none for zeros."""
  if state is None:
    return {}
  return {
    name: (x, state_spec(size, call))
    for name, x, size in zip(
      ("initial_kv", "initial_kk"), state, sizes, strict=True
    )
  }


def final_state(sizes: StateSizes, call: Call) -> dict[str, Output]:
  """Return the outputs that the state goes to at the end of a row."""
  return {
    name: (
      jax.ShapeDtypeStruct((call.B, call.H, *size), jnp.float32),
      state_spec(size, call),
    )
    for name, size in zip(("final_kv", "final_kk"), sizes, strict=True)
  }


def launch(
  body: Callable[[Refs, Call], None],
  call: Call,
  inputs: Mapping[str, Input],
  outputs: Mapping[str, Output],
  sizes: StateSizes,
  name: str,
) -> dict[str, Array]:
  """Run a kernel over the grid. Under `vmap` the new axis joins the batch.

  Args:
    body: the kernel. It gets the references of inputs, outputs and the state in
      VMEM ("kv", "kk") by name.
    call: the launch.
    inputs: arrays and their blocks, by name.
    outputs: shapes and their blocks, by name.
    sizes: of the state in VMEM.
    name: of the kernel, in profiles and in the compiled program.

  Returns:
    The outputs, by name.
  """
  names = (*inputs, *outputs, "kv", "kk")

  def kernel(*refs):
    body(dict(zip(names, refs, strict=True)), call)

  @jax.custom_batching.custom_vmap
  def run(*arrays):
    found = pl.pallas_call(
      kernel,
      grid=(call.B, call.H // call.heads, call.steps),
      in_specs=[spec for _, spec in inputs.values()],
      out_specs=[spec for _, spec in outputs.values()],
      out_shape=[shape for shape, _ in outputs.values()],
      scratch_shapes=[
        pltpu.VMEM((call.heads, *size), jnp.float32) for size in sizes
      ],
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"),
      ),
      name=f"polynomial_{name}",
    )(*arrays)
    return tuple(found)

  @run.def_vmap
  def _(size, mapped, *arrays):
    B = size * call.B

    def join(x, is_mapped):
      if not is_mapped:
        x = jnp.broadcast_to(x, (size, *x.shape))
      return x.reshape(B, *x.shape[2:])

    joined = {
      key: (join(x, is_mapped), spec)
      for (key, (_, spec)), x, is_mapped in zip(
        inputs.items(), arrays, mapped, strict=True
      )
    }
    many = {
      key: (jax.ShapeDtypeStruct((B, *shape.shape[1:]), shape.dtype), spec)
      for key, (shape, spec) in outputs.items()
    }
    found = launch(
      body, dataclasses.replace(call, B=B), joined, many, sizes, name
    )
    split = tuple(x.reshape(size, call.B, *x.shape[1:]) for x in found.values())
    return split, (True,) * len(split)

  found = run(*(x for x, _ in inputs.values()))
  return dict(zip(outputs, found, strict=True))
