"""Hopper kernels of the parts of wide features: sums through the state alone.

A walk of a part, (i, i) or a half of a pair, gives what passes through its own
state, and leaves out the tokens of the chunk. What it writes is added up by
`gpu_wide.py`: float32, (B, heads, T filled up to chunks, ·), a head being
(h, the tile of its values, the part).
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu

from pallas_kernels.polynomial.gpu import (
  backward as backward_kernels,
  feature_pairs,
  forward as forward_kernels,
  pipeline,
  tiles as common,
)
from pallas_kernels.polynomial.gpu.tiles import C, F, Work, f32, times


def forward(q, k, v, rows, states, call: common.Call, *, state: bool) -> list:
  """Σ sim' v (B, heads, T, width), Σ sim' (B, heads, T).

  And (KVᵀ, KK) behind each slice where `state` asks for them.
  """
  streams = _streams(call, q=q, k=k) | dict(v=v)
  outs, tiles = _outs(call, [call.width], rows=1)
  what = pipeline.Launch(
    "forward", streams, rows, states, outs, tiles, after=state
  )
  kind = feature_pairs if call.pairs else forward_kernels
  parts = kind.KEYS._replace(through_state=kind.through_state, within=_write)
  return pipeline.launch(call, parts, what)


def backward_queries(q, k, v, do, rows, states, call: common.Call) -> list:
  """dnum and dden of x_i, or of x_i and x_j each; z and num.

  dq = r dnum + dz dden, as in `backward.dq_state`. (B, heads, T, 16) and
  (B, heads, T).
  """
  streams = _streams(call, q=q, k=k) | dict(v=v, do=do)
  widths = [F] * (4 if call.pairs else 2)
  outs, tiles = _outs(call, widths, rows=2)
  what = pipeline.Launch("backward_queries", streams, rows, states, outs, tiles)
  kind = feature_pairs if call.pairs else backward_kernels
  keys = (feature_pairs if call.pairs else forward_kernels).KEYS
  parts = keys._replace(through_state=kind.dq_state, within=_write)
  return pipeline.launch(call, parts, what)


def backward_keys(
  q, k, v, do, rows, states, call: common.Call, *, state: bool
) -> list:
  """dk of x_i, or of x_i and x_j, (B, heads, T, 16); dv (B, heads, T, width).

  And the cotangents before each slice where `state` asks for them.

  Args:
    rows: r and dz, (B, H · tiles, T filled up), dz 0 but in the first tile; and
      the codes of documents.
  """
  streams = _streams(call, q=q, k=k) | dict(v=v, do=do)
  widths = [F] * (2 if call.pairs else 1) + [call.width]
  outs, _ = _outs(call, widths, rows=0)
  what = pipeline.Launch(
    "backward_keys", streams, rows, states, outs, after=state, left=True
  )
  kind = feature_pairs if call.pairs else backward_kernels
  parts = kind.QUERIES._replace(
    through_state=kind.dkv_state, within=_write_keys
  )
  return pipeline.launch(call, parts, what)


def _streams(call: common.Call, **features) -> dict:
  """Each array of features once, or for x_i and x_j of a pair."""
  if not call.pairs:
    return features
  return features | {f"{name}j": x for name, x in features.items()}


def _outs(call: common.Call, widths: list[int], *, rows: int) -> tuple:
  """The outputs' shapes, and the tile that rows are written from."""
  at = (call.B, call.heads, call.total * C)
  shapes = [(*at, width) for width in widths] + [at] * rows
  tiles = (("rows", (rows, C), None),) if rows else ()
  return tuple(jax.ShapeDtypeStruct(shape, f32) for shape in shapes), tiles


def _write(work: Work, chunk, slot, part) -> None:
  """Writes the (C, ·) values of a part, then its rows (C,)."""
  del slot
  here, tokens = work.here, pl.ds(chunk * C, C)
  wide = [x for x in part if x.ndim == 2]
  rows = part[len(wide) :]
  for ref, x in zip(work.outs[: len(wide)], wide, strict=True):
    ref[here.b, here.head, tokens] = x[:, : ref.shape[-1]]
  if not rows:
    return
  rows_s = work.tiles["rows"]
  plgpu.wait_smem_to_gmem(0)
  for n, x in enumerate(rows):
    rows_s[n] = x
  plgpu.commit_smem()
  for n, ref in enumerate(work.outs[len(wide) :]):
    plgpu.copy_smem_to_gmem(rows_s.at[n], ref.at[here.b, here.head, tokens])


def _write_keys(work: Work, chunk, slot, part) -> None:
  factor = 1 / work.call.grow
  _write(work, chunk, slot, [times(x, factor) for x in part])
