"""Hopper kernels over the rows of an array, one warpgroup a program.

A grid has `programs` × `columns` programs. Program (p, c) treats rows p,
p + programs, p + 2 · programs, … of column part c; short rows are one part.
Its 128 threads hold a row's columns in registers. Importing this module imports
Mosaic GPU, which takes long and needs jax ≥ 0.11; import it where a kernel
is launched.
"""

from collections.abc import Callable
from typing import Any

from jax import Array, lax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.devices import WARPGROUP


def row_kernel(
  body: Callable[..., None],
  name: str,
  out_type: Any,
  programs: int,
  columns: int = 1,
  *,
  approx_math: bool = False,
) -> Callable[..., Any]:
  """Return a kernel that runs `body` in each of programs × columns programs.

  Args:
    body: takes the references of inputs and outputs. It finds its place by
      `lax.axis_index` of "p" and "c"; see `over_rows`.
    name: the kernel's name in profiles and in lowered programs.
    out_type: shape and dtype of each output.
    programs: programs that share the rows.
    columns: parts that a row's columns are split into; see `split`.
    approx_math: let the compiler use fast, less exact functions.
  """
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
  """Run carry = row(r, carry) over this program's rows r; return the carry."""
  p = lax.axis_index("p")
  count = (rows - p + programs - 1) // programs
  return lax.fori_loop(0, count, lambda i, c: row(p + i * programs, c), carry)


def split(D: int, most: int) -> tuple[int, int]:
  """Return (columns of a program, number of column parts).

  Args:
    D: columns of a row, a multiple of 128.
    most: the most columns that one thread may hold.
  """
  sizes = (n * WARPGROUP for n in (8, 4, 2, 1) if n <= most)
  width = next(size for size in sizes if D % size == 0)
  return width, D // width


def load(ref_W: Any) -> Array:
  """Load a program's columns of a row as float32, one vector a thread."""
  layout = _vectors(ref_W.shape[-1])
  return plgpu.load(ref_W, layout=layout).astype(jnp.float32)


def zeros(width: int) -> Array:
  """Return float32 zeros in the register layout of `load`."""
  return plgpu.layout_cast(jnp.zeros(width, jnp.float32), _vectors(width))


def _vectors(width: int):
  return plgpu.Layout.WG_STRIDED((width,), vec_size=width // WARPGROUP)
