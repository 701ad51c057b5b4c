"""The static description of a TPU kernel launch.

Tokens lie along the lanes of a tile and features along its rows: q and k are
(F, C), v and o are (P, C) for a chunk of C tokens. A (T, 16) array would fill
eight times its bytes, because a row of a tile has 128 lanes. Scores are [s, t],
keys along rows. A number of each query, as r, is then one row, which broadcasts
to all rows at no cost.

The kernels compute everything divided by c2: with a = q·k, c1' = c1 / c2 and
c0' = c0 / c2, the similarity is a² + c1' a + c0'. The weights of the features
are then 1, 2, …, 2, 1 for the products, c1' for x and c0' for the 1. Those of
the products are exact in bfloat16. The weights multiply the features of the
queries, φ_w = w∘φ:

    φ_w(q)·φ(k) = sim / c2
"""

import dataclasses

import jax.numpy as jnp

SUBLANES = 8  # rows of a tile
LANES = 128
ONE_ROWS = SUBLANES  # the 1 stands in the first of these rows, 0 in the others
_GROUP_ROWS = 256  # features that are made and used together


@dataclasses.dataclass(frozen=True)
class FeatureGroup:
  """Consecutive features that are made and used together.

  Attributes:
    rows: their rows among the E rows of all features.
    shifts: the r of their blocks x_i x_{i+r}.
    affine: whether x and the 1 follow the blocks.
  """

  rows: slice
  shifts: range
  affine: bool


@dataclasses.dataclass(frozen=True)
class Call:
  """The static description of one launch.

  Attributes:
    B: rows of the batch.
    T: tokens of a row.
    H: heads.
    F: width of a head's queries and keys.
    P: rows of a head's values in the arrays that the kernel reads.
    dtype: of q, k, v and of the operands of products.
    c1: c1 / c2.
    c0: c0 / c2.
    eps: eps / c2.
    affine: whether sim has a constant or a linear term.
    documents: whether rows hold several documents.
    heads: heads of one step of the grid.
    chunk: C, the tokens whose scores are taken as they stand.
    span: tokens of the chunks that are unrolled in the program.
    block: tokens of one step of the grid, which loops over the block's spans.
  """

  B: int
  T: int
  H: int
  F: int
  P: int
  dtype: str
  c1: float
  c0: float
  eps: float
  affine: bool
  documents: bool
  heads: int
  chunk: int
  span: int
  block: int

  @property
  def steps(self) -> int:
    """Steps of the grid along time."""
    return -(-self.T // self.block)

  @property
  def has_tail(self) -> bool:
    """Whether the last block has lanes past the last token."""
    return self.T % self.block != 0

  @property
  def V(self) -> int:
    """Rows of a head's values in VMEM, padded to whole tiles."""
    return -(-self.P // SUBLANES) * SUBLANES

  @property
  def product_rows(self) -> int:
    """Rows of the features that are products x_i x_{i+r}."""
    return self.F * (self.F // 2 + 1)

  @property
  def E(self) -> int:
    """Rows of all features, in the kernels' own form."""
    return self.product_rows + (self.F + ONE_ROWS if self.affine else 0)

  @property
  def G(self) -> int:
    """Rows of x̃: x, and the rows of the 1."""
    return self.F + (ONE_ROWS if self.affine else 0)

  @property
  def vmem_bytes(self) -> int:
    """Bytes of VMEM that a step of the largest kernel takes."""
    # q, k, v, do, dk and dv, each twice: the next step's blocks arrive during
    # this step.
    tokens = 6 * jnp.dtype(self.dtype).itemsize * (self.F + self.P)
    # The state itself, and twice one that comes in and one that goes out. A
    # float32 row fills all lanes.
    states = 5 * 4 * LANES * (self.E + self.G)
    return self.heads * (tokens * self.block + states)

  def weight(self, shift: int) -> float:
    """Return the weight in sim / c2 of the products x_i x_{i+shift}."""
    return 1.0 if shift == 0 or 2 * shift == self.F else 2.0

  def groups(self) -> list[FeatureGroup]:
    """Split the features into groups of at most about 256 rows."""
    size, blocks = max(1, _GROUP_ROWS // self.F), self.F // 2 + 1
    starts = range(0, blocks, size)
    groups = []
    for start in starts:
      shifts = range(start, min(start + size, blocks))
      affine = self.affine and start == starts[-1]
      rows = len(shifts) * self.F + (self.F + ONE_ROWS if affine else 0)
      first = start * self.F
      groups.append(FeatureGroup(slice(first, first + rows), shifts, affine))
    return groups
