"""The records that the code of a warpgroup receives.

Names that end in `_s` are references to shared memory, names that end in `_ref`
are references to HBM. Other arrays are in registers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from pallas_kernels.polynomial.gpu.launch import Launch


class Place(NamedTuple):
  """The walk that a warpgroup does. All fields are traced integers, or 0.

  Attributes:
    in_program: the number of the walk within its program.
    s: the slice of time.
    b: the row.
    walk: the number of the walk within its row and slice. It counts terms
      fastest, then value tiles, then heads.
    h: the head.
    tile: the value tile; None where there is a single one.
    first_chunk: the first chunk of the slice.
    chunks: the number of chunks of the slice.
    i: the first part of the term.
    j: the second part of the term; i in a square.
    half: which half of the pair.
  """

  in_program: Any
  s: Any
  b: Any
  walk: Any
  h: Any
  tile: Any
  first_chunk: Any
  chunks: Any
  i: Any = 0
  j: Any = 0
  half: Any = 0

  @property
  def state_index(self) -> tuple:
    """The index of the walk in arrays of states, (slices, B, walks, ·, ·)."""
    return self.s, self.b, self.walk


class Shared(NamedTuple):
  """The shared memory that the two warpgroups of a walk both use.

  Attributes:
    phi: features of the chunk (C, E) that are added to the state.
    extended: k̃ or dz q̃ of the chunk (C, TILE): PART columns, perhaps two more,
      then zeros.
    kv: a copy of KVᵀ (TILE, E) in the operands' dtype.
    kk: a copy of KK (2, TILE, PART), as a high and a low half.
    x: (C, PART) the keys or queries of the document that the state belongs to,
      0 for other tokens; None without documents.
    values: (C, TILE) the values of `x`, likewise; None without documents.
    copied: barriers, one a stage: the copies of a chunk's inputs have arrived.
    features_written: a barrier: `phi` and `extended` hold this chunk.
    state_read: a barrier: the output warpgroup is done with `kv` and `kk`.
    state_written: a barrier: `kv` and `kk` hold the state before this chunk.
  """

  phi: Any
  extended: Any
  kv: Any
  kk: Any
  x: Any
  values: Any
  copied: Any
  features_written: Any
  state_read: Any
  state_written: Any


class Work(NamedTuple):
  """Everything that the code of a warpgroup works with.

  Attributes:
    launch: the static record of the launch.
    here: which walk the warpgroup does.
    shared: shared memory of the walk; None in kernels without a state.
    inputs: by name, a chunk of an input (stages, C, ·) in shared memory.
    staging: by name, shared memory from which an output is copied to HBM.
    outputs: references to the output arrays in HBM.
    rolls: the rolling matrices Π (PART, PART · blocks) in shared memory.
    operand: (C, PART), shared memory for operands; None unless `by_shared`.
    initial_count: float32, the tokens that the state before the slice sums, of
      the row's first document.
  """

  launch: Launch
  here: Place
  shared: Any
  inputs: dict
  staging: dict
  outputs: Sequence
  rolls: Any
  operand: Any
  initial_count: Any
