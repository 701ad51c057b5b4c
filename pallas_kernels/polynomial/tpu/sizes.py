"""How large the chunks, spans, blocks and head groups of a TPU kernel are.

The sizes below were chosen by the compiler's schedule, not by a measured time:
libtpu 0.0.50.1 compiled each kernel (T = 4096, H = 12, P = 64, bfloat16,
REBASED) with several chunks and spans, and these gave the fewest instruction
bundles per token and head. `tools/tpu_schedule.py --sweep` repeats that,
and `benchmarks/results/tpu_schedule.json` has the figures. They are the same
for all generations and kernels but for the chunk, which follows the width of
the matrix unit: 128 on v5e and v5p, 256 on v6e.
"""

import dataclasses
from typing import NamedTuple

import jax

from pallas_kernels import devices
from pallas_kernels.polynomial.operator import Kernel
from pallas_kernels.polynomial.tpu.call import LANES, SUBLANES, Call

WIDTHS = (8, 16, 32, 64)  # the F that the kernels take

_SPANS = {8: 1024, 16: 2048, 32: 512, 64: 256}
_BLOCKS = {8: 2048, 16: 4096, 32: 2048, 64: 2048}
_CHUNKS = {"v5e": 128, "v5p": 128, "v6e": 256}
_OTHER_CHUNKS = {
  ("v5e", "backward_keys", 64): 256,
  ("v5p", "backward_keys", 64): 256,
  ("v6e", "backward_queries", 32): 128,
  ("v6e", "backward_keys", 32): 128,
  ("v6e", "backward_keys", 64): 128,
}

# Bytes of VMEM that a launch may take by `Call.vmem_bytes`. A kernel gets 16
# MiB, but spilled registers take some of it.
VMEM_LIMIT = 12 << 20


class Sizes(NamedTuple):
  """Tokens of a chunk, of a span and of a block; see `Call`."""

  chunk: int
  span: int
  block: int


def best_sizes(generation: str, kernel: str, F: int) -> Sizes:
  """Return the sizes for long rows.

  Args:
    generation: "v5e", "v5p" or "v6e".
    kernel: "forward", "backward_queries" or "backward_keys".
    F: width of queries and keys, one of `WIDTHS`.
  """
  chunk = _OTHER_CHUNKS.get((generation, kernel, F), _CHUNKS[generation])
  return Sizes(chunk, _SPANS[F], _BLOCKS[F])


def sizes_for(kernel: str, F: int, T: int) -> Sizes:
  """Return the sizes for rows of T tokens, on the TPU that the call runs on.

  They are smaller than the best ones where the row is short, so that at most
  about a quarter of the work is past the end of the row.
  """
  best = best_sizes(devices.tpu_generation(), kernel, F)
  chunk = min(best.chunk, _round_up(T, LANES))
  span = min(best.span, _round_up(T, chunk))
  while span % (2 * chunk) == 0 and 4 * _round_up(T, span) > 5 * T:
    span //= 2
  steps = -(-T // best.block)
  return Sizes(chunk, span, _round_up(-(-T // steps), span))


def _round_up(x: int, multiple: int) -> int:
  return -(-x // multiple) * multiple


def make_call(
  name: str,
  q: jax.Array | jax.ShapeDtypeStruct,
  v: jax.Array | jax.ShapeDtypeStruct,
  kernel: Kernel,
  *,
  documents: bool,
) -> Call:
  """Describe the launch of a kernel.

  A step of the grid takes the fewest heads whose values together are whole
  tiles. Where VMEM does not hold so many, a step takes one head, and each
  head's values are padded to whole tiles.

  Args:
    name: "forward", "backward_queries" or "backward_keys".
    q: queries or keys (B, T, H, F).
    v: values or their cotangents (B, T, H, P).
    kernel: the static numbers.
    documents: whether rows hold several documents.
  """
  B, T, H, F = q.shape
  P, c = v.shape[-1], kernel.coefficients
  chunk, span, block = sizes_for(name, F, T)
  call = Call(
    B=B,
    T=T,
    H=H,
    F=F,
    P=P,
    dtype=str(q.dtype),
    c1=c.c1 / c.c2,
    c0=c.c0 / c.c2,
    eps=kernel.eps / c.c2,
    affine=c.affine,
    documents=documents,
    heads=_heads_per_step(H, P),
    chunk=chunk,
    span=span,
    block=block,
  )
  fitted = _fit(call)
  if fitted.vmem_bytes > VMEM_LIMIT:
    fitted = _fit(dataclasses.replace(call, P=call.V, heads=1))
  return fitted


def _heads_per_step(H: int, P: int) -> int:
  """Return the fewest heads whose values fill whole tiles, or all heads."""
  for heads in range(1, H):
    if H % heads == 0 and heads * P % SUBLANES == 0:
      return heads
  return H


def _fit(call: Call) -> Call:
  """Reduce the span for the program's size, then the block for VMEM."""
  span, block = call.span, call.block
  # Each head and chunk of a span is unrolled in the program.
  while span * call.heads > call.span and span % (2 * call.chunk) == 0:
    span //= 2
  call = dataclasses.replace(call, span=span)
  while call.vmem_bytes > VMEM_LIMIT and block > span:
    block = -(-block // (2 * span)) * span
    call = dataclasses.replace(call, block=block)
  return call
