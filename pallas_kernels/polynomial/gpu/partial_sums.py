"""The outputs of the walks where F > 16: sums through the states alone.

Each walk does one term, and writes what passes through its state. The tokens of
the chunk itself are left out, because their scores need all parts at once.
`within_chunk.py` adds up the walks, and the tokens of the chunk.

The sums are float32 in HBM, written once and read once. With value tiles W wide
and P padded to a multiple of 16, they take per token and head, in bytes

    forward            4 · value tiles · m² (W + 1)
    backward_queries   4 · value tiles · m (66 m − 32)
    backward_keys      4 · value tiles · m (m (W + 32) − 16)

which is 1,040, 800 and 1,408 for F = 32 and P = 64, and 3,136, 3,712 and 4,864
for F = 64 and P = 48.
"""

import functools

import jax
from jax import Array, lax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.polynomial.gpu.launch import C, Launch
from pallas_kernels.polynomial.gpu.pipeline import Staging
from pallas_kernels.polynomial.gpu.tiles import f32, times
from pallas_kernels.polynomial.gpu.warpgroup import Work


def outputs(
  launch: Launch, widths: list[int], *, vectors: int
) -> tuple[tuple, tuple]:
  """Describe the outputs of a launch, and their staging.

  Args:
    launch: the static record of the launch.
    widths: the widths of the outputs (B, walks, T padded to chunks, width).
    vectors: how many outputs (B, walks, T padded to chunks) follow.
  """
  at = (launch.B, launch.walks, launch.total_chunks * C)
  shapes = [(*at, width) for width in widths] + [at] * vectors
  staging = (Staging("vectors", (vectors, C), None),) if vectors else ()
  return tuple(jax.ShapeDtypeStruct(shape, f32) for shape in shapes), staging


def write(work: Work, chunk, slot, sums) -> None:
  """Write the sums of a chunk: first those (C, width), then those (C,).

  The former go from registers to HBM, without staging.
  """
  del slot
  here, tokens = work.here, pl.ds(chunk * C, C)
  wide = [x for x in sums if x.ndim == 2]
  vectors = sums[len(wide) :]
  for ref, x in zip(work.outputs[: len(wide)], wide, strict=True):
    ref[here.b, here.walk, tokens] = x[:, : ref.shape[-1]]
  if not vectors:
    return
  vectors_s = work.staging["vectors"]
  plgpu.wait_smem_to_gmem(0)
  for n, x in enumerate(vectors):
    vectors_s[n] = x
  plgpu.commit_smem()
  for n, ref in enumerate(work.outputs[len(wide) :]):
    plgpu.copy_smem_to_gmem(vectors_s.at[n], ref.at[here.b, here.walk, tokens])


def write_gradients(work: Work, chunk, slot, sums) -> None:
  """Write sums that the scaled r and dz have entered, without their scale."""
  factor = 1 / work.launch.gradient_scale
  write(work, chunk, slot, [times(x, factor) for x in sums])


# On the host.


def add_walks(x: Array, launch: Launch) -> Array:
  """Sum (B, walks, T) over value tiles and terms, to (B, H, T)."""
  return _sum(_sum(_split_walks(x, launch), 3), 2)


def add_terms(x: Array, launch: Launch) -> Array:
  """Sum (B, walks, T) over the terms, to (B, H, T).

  All value tiles of a head have the same numbers; those of the first are taken.
  """
  return _sum(_split_walks(x, launch)[:, :, 0], 2)


def _split_walks(x: Array, launch: Launch) -> Array:
  """(B, walks, …) → (B, H, value_tiles, terms, …)."""
  at = (launch.B, launch.H, launch.value_tiles, launch.terms)
  return x.reshape(*at, *x.shape[2:])


def _sum(x: Array, axis: int) -> Array:
  """Sum over a short axis by additions, which XLA fuses with what follows."""
  each = (
    lax.index_in_dim(x, i, axis, keepdims=False) for i in range(x.shape[axis])
  )
  return functools.reduce(jnp.add, each)
