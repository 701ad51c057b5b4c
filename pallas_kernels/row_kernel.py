"""A Mosaic GPU kernel over rows, of programs of one warpgroup each.

Where rows are long, a program takes some columns of them, "c".
"""

from collections.abc import Callable
from typing import Any

from jax import lax
import jax.experimental.pallas.mosaic_gpu as plgpu


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
