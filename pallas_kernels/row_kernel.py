"""A Mosaic GPU kernel over rows, of programs of one warpgroup each.

Where rows are long, a program takes some columns of them, "c".
"""

from collections.abc import Callable
from typing import Any

from jax import Array, lax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.hopper import WARPGROUP


def row_kernel(
  body: Callable[..., None],
  name: str,
  out_type: Any,
  programs: int,
  columns: int = 1,
  *,
  approx_math: bool = False,
) -> Callable[..., Any]:
  """Of so many programs for each part of the columns; see `over_rows`."""
  return plgpu.kernel(
    body,
    out_type=out_type,
    grid=(programs, columns),
    grid_names=("p", "c"),
    kernel_name=name,
    compiler_params=plgpu.CompilerParams(approx_math=approx_math),
  )


def over_rows(
  rows: int, programs: int, row: Callable[[Any, Any], Any], carry: Any
) -> Any:
  """In a body: carry = row(r, carry), of every n-th row for n programs."""
  p = lax.axis_index("p")
  count = (rows - p + programs - 1) // programs
  return lax.fori_loop(0, count, lambda i, c: row(p + i * programs, c), carry)


def split(D: int, most: int) -> tuple[int, int]:
  """Columns of a program, at most so many a thread; and how many parts."""
  sizes = (n * WARPGROUP for n in (8, 4, 2, 1) if n <= most)
  width = next(size for size in sizes if D % size == 0)
  return width, D // width


def load(ref_W: Any) -> Array:
  """In float32, a program's columns of a row: one vector of each thread."""
  layout = _vectors(ref_W.shape[-1])
  return plgpu.load(ref_W, layout=layout).astype(jnp.float32)


def zeros(width: int) -> Array:
  """Float32, as `load` has them."""
  return plgpu.layout_cast(jnp.zeros(width, jnp.float32), _vectors(width))


def _vectors(width: int):
  return plgpu.Layout.WG_STRIDED((width,), vec_size=width // WARPGROUP)
