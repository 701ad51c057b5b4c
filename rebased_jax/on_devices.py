"""Runs a kernel over rows on each device's own part of its arrays."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from pallas_kernels import ShardAxes


def on_devices(
  run: Callable[..., Any], axes: ShardAxes | None, *, inputs: Any, outputs: Any
) -> Callable[..., Any]:
  """`run` of each device's part of arrays over the ambient mesh.

  Args:
    run: works on the part of one device, and may use `over_tokens`.
    axes: the mesh axes that split the arrays; None: `run` takes them whole.
    inputs: a letter for each array, "r": of tokens, (B, T, ·); "c": likewise,
      of channels that the axes of heads split; "p": the parameter (channels,)
      of a "c"; "w": whole on every device.
    outputs: likewise.

  The first array is of tokens. ValueError where the mesh does not fit it.
  """
  if axes is None:
    return run
  specs = {
    "r": axes.bt(),
    "c": axes.btx(),
    "p": jax.P(axes.heads),
    "w": jax.P(),
  }
  in_specs, out_specs = jax.tree.map(specs.__getitem__, (inputs, outputs))
  split = jax.shard_map(
    run, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )

  def checked(*arrays):
    rows, time, *_ = jax.tree.leaves(arrays)[0].shape
    axes.check(rows, None, time)
    return split(*arrays)

  return checked


def rows(x_BTD: Array) -> Array:
  """(R, D), R = B T."""
  return x_BTD.reshape(-1, x_BTD.shape[-1])


def over_tokens(sums: Any, axes: ShardAxes | None) -> Any:
  """In `run`: sums of a device's tokens, summed over all that split tokens."""
  return sums if axes is None else jax.lax.psum(sums, axes.bt_names())
