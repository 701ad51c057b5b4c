"""The kernels that finish a pass where F > 16: they add the chunk's own tokens.

The walks of the terms have written what reaches each chunk through their states
(`partial_sums.py`). The kernels here add these sums up, add the tokens of the
chunk itself with scores of all parts, and write the results. They have no state
and no walk: a warpgroup does one chunk of one head, with all its value tiles.
The equations are those of `forward.py` and `backward.py`.
"""

from collections.abc import Callable
import functools
import operator
from typing import Any, NamedTuple

import jax
from jax import Array, lax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.polynomial.gpu import (
  documents,
  partial_sums,
  pipeline,
  tiles,
)
from pallas_kernels.polynomial.gpu.launch import (
  PART,
  TILE,
  C,
  Launch,
  Plan,
  pairs_of,
)
from pallas_kernels.polynomial.gpu.pipeline import Staging
from pallas_kernels.polynomial.gpu.tiles import (
  FIRST_AXIS,
  LAYOUT,
  SECOND_AXIS,
  add_mma,
  columns,
  f32,
  mma,
  mmas,
  times,
)
from pallas_kernels.polynomial.gpu.warpgroup import Place, Work

WARPGROUPS = 2  # of a program, which leaves 255 registers a thread


class _Stream(NamedTuple):
  """An input of which a warpgroup reads a few columns.

  Attributes:
    array: (B, T, H, ·).
    start: the first column.
    width: the number of columns.
  """

  array: Array
  start: int
  width: int


def forward(
  q: Array,
  k: Array,
  v: Array,
  per_token: dict[str, Array],
  sums: list[list[Array]],
  plan: Plan,
) -> Array:
  """Finish the forward.

  Args:
    q: (B, T, H, 16 · parts), padded as `launch.Plan` pads it.
    k: likewise.
    v: (B, T, H, P), padded likewise.
    per_token: the codes of documents, (B, 1, T padded), or {}.
    sums: for the squares and for the pairs, the outputs of `forward.forward`.
    plan: the launches of the call.

  Returns:
    o (B, T, H, P).
  """
  whole, numerators, z_BHT = plan.whole, [], jnp.float32(0)
  for (numerator, z), launch in zip(sums, plan.launches, strict=True):
    numerators.append(numerator)
    z_BHT += partial_sums.add_terms(z, launch)
  shape = (whole.B, whole.padded_T, whole.H, whole.P)
  (o,) = _run(
    "forward",
    _forward,
    _part_streams(whole, q=q, k=k) | _value_streams(whole, v=v),
    dict(z=z_BHT) | per_token,
    numerators,
    [jax.ShapeDtypeStruct(shape, whole.dtype)],
    [pipeline.value_staging("o", whole)],
    whole,
  )
  return o


def backward_queries(
  q: Array,
  k: Array,
  v: Array,
  do: Array,
  per_token: dict[str, Array],
  sums: list[list[Array]],
  plan: Plan,
) -> list[Array]:
  """Finish the derivative with respect to the queries.

  Args:
    q: (B, T, H, 16 · parts), padded as `launch.Plan` pads it.
    k: likewise.
    v: (B, T, H, P), padded likewise.
    do: likewise.
    per_token: the codes of documents, (B, 1, T padded), or {}.
    sums: for the squares and for the pairs, the outputs of
      `backward.backward_queries`.
    plan: the launches of the call.

  Returns:
    dq (B, T, H, 16 · parts), r and dz (B, H, T padded) float32.
  """
  whole, gradients = plan.whole, []
  num_BHT, z_BHT = jnp.float32(0), jnp.float32(0)
  for (*wide, z, num), launch in zip(sums, plan.launches, strict=True):
    gradients += wide
    num_BHT += partial_sums.add_walks(num, launch)
    z_BHT += partial_sums.add_terms(z, launch)
  vector = jax.ShapeDtypeStruct((whole.B, whole.H, whole.total_chunks * C), f32)
  shape = (whole.B, whole.padded_T, whole.H, whole.parts * PART)
  return _run(
    "queries",
    _backward_queries,
    _part_streams(whole, q=q, k=k) | _value_streams(whole, v=v, do=do),
    dict(z=z_BHT, num=num_BHT) | per_token,
    gradients,
    [jax.ShapeDtypeStruct(shape, whole.dtype), vector, vector],
    [
      Staging("dq", (C, PART), tiles.SWIZZLE_32),
      Staging("vectors", (2, C), None),
    ],
    whole,
  )


def backward_keys(
  q: Array,
  k: Array,
  v: Array,
  do: Array,
  per_token: dict[str, Array],
  sums: list[list[Array]],
  plan: Plan,
) -> list[Array]:
  """Finish the derivative with respect to the keys and values.

  Args:
    q: (B, T, H, 16 · parts), padded as `launch.Plan` pads it.
    k: likewise.
    v: (B, T, H, P), padded likewise.
    do: likewise.
    per_token: r and dz, (B, H, T padded); and the codes of documents.
    sums: for the squares and for the pairs, the outputs of
      `backward.backward_keys`.
    plan: the launches of the call.

  Returns:
    dk (B, T, H, 16 · parts) and dv (B, T, H, P).
  """
  whole = plan.whole
  at = whole.B, whole.padded_T, whole.H
  widths = whole.parts * PART, whole.P
  return _run(
    "keys",
    _backward_keys,
    _part_streams(whole, q=q, k=k) | _value_streams(whole, v=v, do=do),
    per_token,
    [x for outputs in sums for x in outputs],
    [jax.ShapeDtypeStruct((*at, width), whole.dtype) for width in widths],
    [
      Staging("dk", (C, PART), tiles.SWIZZLE_32),
      pipeline.value_staging("dv", whole),
    ],
    whole,
  )


def _part_streams(launch: Launch, **arrays: Array) -> dict[str, _Stream]:
  """Name the parts of q and k: "q0", "q1", …, "k0" and so on."""
  return {
    f"{name}{i}": _Stream(x, i * PART, PART)
    for name, x in arrays.items()
    for i in range(launch.parts)
  }


def _value_streams(launch: Launch, **arrays: Array) -> dict[str, _Stream]:
  """Name the value tiles: "v0", "v1", "do0" and so on."""
  return {
    f"{name}{t}": _Stream(x, t * TILE, TILE)
    for name, x in arrays.items()
    for t in range(launch.value_tiles)
  }


# What a warpgroup does with its chunk: (work, chunk, references to the sums).


def _forward(work: Work, chunk, sums) -> None:
  """Write o of a chunk."""
  launch = work.launch
  scores = _scores(_streams(work, "q"), _streams(work, "k"))
  (a,) = mmas(work, scores)
  seen = _causal_mask(work, query_axis=0)
  sim = jnp.where(seen, tiles.polynomial(a, launch), 0.0)
  z = _vector(work, "z")
  r = 1.0 / (z + sim.sum(axis=1) + launch.eps)
  low = sim.astype(launch.dtype)
  for tile, v_s in enumerate(_streams(work, "v")):
    numerator = _sum(work, chunk, _all_terms(work, sums, tile))
    existing = v_s.at[:, pl.ds(0, launch.tile_width)]
    numerator = add_mma(work, numerator, (low, existing))
    o = numerator * columns(r, launch.tile_width)
    _write(work, "o", o, _value_target(work, work.outputs[0], chunk, tile))


def _backward_queries(work: Work, chunk, sums) -> None:
  """Write dq, r and dz of a chunk.

  As in `backward.py`, r and dz are complete before da is rounded.
  """
  launch, here = work.launch, work.here
  ks = _streams(work, "k")
  do, v = _streams(work, "do"), _streams(work, "v")
  a, dsim = mmas(work, _scores(_streams(work, "q"), ks), _scores(do, v))
  seen = _causal_mask(work, query_axis=0)
  sim = jnp.where(seen, tiles.polynomial(a, launch), 0.0)
  z = _vector(work, "z") + sim.sum(axis=1)
  num = _vector(work, "num") + (sim * dsim).sum(axis=1)
  r = 1.0 / (z + launch.eps)
  dz = -(num * r) * r
  dscores = columns(r, C) * dsim + columns(dz, C)
  da = dscores * tiles.derivative(a, launch)
  da = jnp.where(seen, da, 0.0).astype(launch.dtype)
  dnum_ii, dden_ii, dnum_i, dnum_j, dden_i, dden_j = sums
  for i, k_s in enumerate(ks):
    # dnum is a sum over the values; dden is the same for all of them.
    dnums = _terms_of_part(
      work, dnum_ii, dnum_i, dnum_j, i, value_tiles=launch.value_tiles
    )
    dnum = _sum(work, chunk, dnums)
    ddens = _terms_of_part(work, dden_ii, dden_i, dden_j, i, value_tiles=1)
    dden = _sum(work, chunk, ddens)
    dq = columns(r, PART) * dnum + columns(dz, PART) * dden
    dq = add_mma(work, dq, (da, k_s))
    _write(work, "dq", dq, _part_target(work, work.outputs[0], chunk, i))
  token = plgpu.broadcasted_iota(jnp.int32, (C,), 0, layout=FIRST_AXIS)
  exists = chunk * C + token < launch.T
  vectors_s = work.staging["vectors"]
  vectors_s[0] = jnp.where(exists, r, 0.0)
  vectors_s[1] = jnp.where(exists, dz, 0.0)
  plgpu.commit_smem()
  for n, ref in enumerate(work.outputs[1:]):
    target = ref.at[here.b, here.h, pl.ds(chunk * C, C)]
    plgpu.copy_smem_to_gmem(vectors_s.at[n], target)


def _backward_keys(work: Work, chunk, sums) -> None:
  """Write dk and dv of a chunk. The scores are [key, query] here."""
  launch = work.launch
  qs = _streams(work, "q")
  do, v = _streams(work, "do"), _streams(work, "v")
  a, dsim = mmas(work, _scores(_streams(work, "k"), qs), _scores(v, do))
  seen = _causal_mask(work, query_axis=1)

  def for_each_key(name):
    value = times(_vector(work, name, SECOND_AXIS), launch.gradient_scale)
    return lax.broadcast_in_dim(value, (C, C), [1])

  r, dz = for_each_key("r"), for_each_key("dz")
  da = (r * dsim + dz) * tiles.derivative(a, launch)
  da = jnp.where(seen, da, 0.0).astype(launch.dtype)
  sim = jnp.where(seen, r * tiles.polynomial(a, launch), 0.0)
  sim = sim.astype(launch.dtype)
  dk_ii, dv_squares, dk_i, dk_j, dv_pairs = sums
  unscale = 1 / launch.gradient_scale
  for i, q_s in enumerate(qs):
    dk = times(mma(work, (da, q_s), shape=(C, PART)), unscale)
    dks = _terms_of_part(
      work, dk_ii, dk_i, dk_j, i, value_tiles=launch.value_tiles
    )
    dk = dk + _sum(work, chunk, dks)
    _write(work, "dk", dk, _part_target(work, work.outputs[0], chunk, i))
  for tile, do_s in enumerate(do):
    operands = sim, do_s.at[:, pl.ds(0, launch.tile_width)]
    dv = times(mma(work, operands, shape=(C, launch.tile_width)), unscale)
    dvs = _all_terms(work, (dv_squares, dv_pairs), tile)
    dv = dv + _sum(work, chunk, dvs)
    _write(work, "dv", dv, _value_target(work, work.outputs[1], chunk, tile))


# Inputs.


def _streams(work: Work, name: str) -> list:
  """List the parts or value tiles of an input, in shared memory."""
  launch = work.launch
  count = launch.parts if name in ("q", "k") else launch.value_tiles
  return [work.inputs[f"{name}{n}"].at[0] for n in range(count)]


def _scores(xs: list, ys: list) -> tuple:
  """Describe the product Σ x yᵀ over parts or value tiles, for `mmas`."""
  operands = [(x, y.transpose((1, 0))) for x, y in zip(xs, ys, strict=True)]
  return ((C, C), *operands)


def _vector(work: Work, name: str, layout=FIRST_AXIS):
  """Load an input with one value a token, (C,)."""
  return plgpu.load(work.inputs[name].at[0], layout=layout)


def _causal_mask(work: Work, *, query_axis: int):
  """Whether a query attends to a key of the chunk, (C, C)."""
  return documents.causal_mask(work, 0, 0, C, query_axis=query_axis)


# Sums through the states. A list of (reference, number of the walk) says which
# of them are added up.


def _sum(work: Work, chunk, walks: list[tuple]):
  """Load and add the sums of these walks, (C, ·) float32."""
  tokens = pl.ds(chunk * C, C)

  def load(ref, walk):
    source = ref.at[work.here.b, walk, tokens]
    return plgpu.load(source, layout=LAYOUT, optimized=False)

  return functools.reduce(operator.add, (load(*walk) for walk in walks))


def _all_terms(work: Work, refs, tile: int) -> list[tuple]:
  """List a value tile's walks of all squares, refs[0], and pairs, refs[1]."""
  launch = work.launch
  at = work.here.h * launch.value_tiles + tile
  counts = launch.parts, launch.parts * (launch.parts - 1)
  return [
    (ref, at * count + n)
    for ref, count in zip(refs, counts, strict=True)
    for n in range(count)
  ]


def _terms_of_part(
  work: Work, square_ref, first_ref, second_ref, i: int, *, value_tiles: int
) -> list[tuple]:
  """List the walks that have a gradient of x_i.

  Args:
    work: the work of the warpgroup.
    square_ref: gradients of the squares.
    first_ref: gradients of the first part of pairs.
    second_ref: gradients of the second part of pairs.
    i: the part.
    value_tiles: of how many value tiles, which are added up.
  """
  launch, walks = work.launch, []
  terms_of_pairs = launch.parts * (launch.parts - 1)
  for tile in range(value_tiles):
    at = work.here.h * launch.value_tiles + tile
    walks.append((square_ref, at * launch.parts + i))
    for n, (first, second) in enumerate(pairs_of(launch.parts)):
      if i not in (first, second):
        continue
      ref = first_ref if first == i else second_ref
      start = at * terms_of_pairs + 2 * n
      walks += [(ref, start), (ref, start + 1)]
  return walks


# Outputs.


def _write(work: Work, name: str, x, target) -> None:
  """Copy a tile to HBM through its staging memory."""
  staging = work.staging[name]
  plgpu.wait_smem_to_gmem(0)
  staging[...] = x.astype(staging.dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(staging, target)


def _part_target(work: Work, ref, chunk, i: int):
  """Select a chunk of part i from an array (B, T, H, 16 · parts)."""
  here = work.here
  return ref.at[here.b, pl.ds(chunk * C, C), here.h, pl.ds(i * PART, PART)]


def _value_target(work: Work, ref, chunk, tile: int):
  """Select a chunk of a value tile from an array (B, T, H, P)."""
  here = work.here
  # A slice that is static and too wide is refused; hence a traced number.
  traced = here.b * 0 + tile if work.launch.value_tiles > 1 else None
  at = work._replace(here=here._replace(tile=traced))
  return tiles.value_columns(at, ref, chunk)


# The launch.


def _run(
  name: str,
  finish: Callable,
  streams: dict[str, _Stream],
  per_token: dict[str, Array],
  sums: list[Array],
  outputs: list[jax.ShapeDtypeStruct],
  staging: list[Staging],
  launch: Launch,
) -> list[Array]:
  """Run a kernel over the grid (chunks, groups of heads).

  Args:
    name: of the kernel, in a profile.
    finish: (work, chunk, references to the sums) writes the outputs.
    streams: by name, what is read chunk by chunk.
    per_token: by name, inputs with one value a token, (B, 1 or H, T padded).
    sums: the sums through the states.
    outputs: shapes and dtypes of the outputs.
    staging: shared memory from which the outputs are copied.
    launch: the call as a whole.
  """
  arrays = [x.array for x in streams.values()] + list(per_token.values())
  smem = functools.partial(tiles.smem, launch, WARPGROUPS)
  inputs = {x: smem(1, C, stream.width) for x, stream in streams.items()}
  for x, values in per_token.items():
    inputs[x] = plgpu.SMEM((WARPGROUPS, 1, C), values.dtype)
  buffers = {
    x.name: plgpu.SMEM((WARPGROUPS, *x.shape), f32)
    if x.swizzle is None
    else smem(*x.shape, swizzle=x.swizzle)
    for x in staging
  }

  def body(*refs, copied, inputs, operand, staging):
    first, last = len(arrays), len(arrays) + len(sums)
    w = lax.axis_index("w")
    n, chunk = lax.axis_index("n") * WARPGROUPS + w, lax.axis_index("s")
    b, h = lax.div(n, launch.H), lax.rem(n, launch.H)

    @pl.when(n < launch.B * launch.H)
    def _():
      work = Work(
        launch,
        Place(w, 0, b, h, h, None, chunk, 1),
        shared=None,
        inputs={x: buffer.at[w] for x, buffer in inputs.items()},
        staging={x: buffer.at[w] for x, buffer in staging.items()},
        outputs=refs[last:],
        rolls=None,
        operand=operand.at[w] if launch.by_shared else None,
        initial_count=None,
      )
      _fetch(work, streams, per_token, refs[:first], copied.at[w], chunk)
      plgpu.barrier_wait(copied.at[w])
      finish(work, chunk, refs[first:last])
      plgpu.wait_smem_to_gmem(0)

  scratch: dict[str, Any] = dict(
    copied=plgpu.Barrier(num_arrivals=len(inputs), num_barriers=WARPGROUPS),
    inputs=inputs,
    operand=smem(C, PART) if launch.by_shared else None,
    staging=buffers,
  )
  kernel = plgpu.kernel(
    body,
    out_type=outputs,
    scratch_types=scratch,
    compiler_params=tiles.compiler_params(),
    kernel_name=f"polynomial_chunk_{name}",
    grid=(launch.total_chunks, -(-launch.B * launch.H // WARPGROUPS)),
    grid_names=("s", "n"),
    num_threads=WARPGROUPS,
    thread_name="w",
  )
  return kernel(*arrays, *sums)


def _fetch(work: Work, streams, per_token, sources, barrier, chunk) -> None:
  """Start the copies of a chunk; TMA fills with 0 beyond T or P."""
  here, tokens = work.here, pl.ds(chunk * C, C)
  for name, ref in zip((*streams, *per_token), sources, strict=True):
    if name in per_token:
      line = 0 if ref.shape[1] == 1 else here.h
      source = ref.at[here.b, line, tokens]
    else:
      _, start, width = streams[name]
      if width > PART and ref.shape[-1] != width:
        # A slice that is static and too wide is refused; a traced one is not.
        start = here.b * 0 + start
      source = ref.at[here.b, tokens, here.h, pl.ds(start, width)]
    plgpu.copy_gmem_to_smem(source, work.inputs[name].at[0], barrier)
