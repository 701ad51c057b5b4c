"""Batches of text for language models, as pure functions of the step.

    place p = step · rows + r           r is the row of the global batch
    (set, q) = mix(p)                   if there are several data sets
    (epoch, i) = divmod(q, rows of the set)
    row = permute(i; seed, set, epoch)  a row of the set, W = L + 1 tokens

    tokens       int32    (B, T)   the first L tokens of the row
    targets      int32    (B, T)   the last L tokens of the row
    weights      float32  (B, T)   1 if the target is in the token's document
    segment_ids  int32    (B, T)   packing "documents" only: 1, 2, … number the
                                   documents of a row; 0 is padding

With the other packings every weight is 1. Held-out batches hold each row once,
in an order that does not depend on the seed. The last batch is filled up with
copies of a row at weight 0.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train.data import order
from train.data.batches import Batch, Batches, Fingerprint
from train.data.checks import require
from train.data.text import packing
from train.data.text.packing_cache import CACHE_DIR
from train.data.text.rows import Layout, fill_rows, make_plan, open_source
from train.data.text.token_source import DataError, TokenSource

_VERSION = 1
_HELD_OUT = 1 << 63  # replaces the seed, which is always smaller


class _Part(NamedTuple):
  """One data set of a mixture, and the plan of its rows."""

  source: TokenSource
  plan: packing.RowPlan


@dataclasses.dataclass(frozen=True)
class LMBatches(Batches):
  """Batches of one split of one or more data sets.

  The files are opened at the first use.

  Attributes:
    paths: prepared folders, and Megatron indices NAME.idx.
    layout: how documents become rows.
    rows: the number of rows of one global batch.
    seed: decides the order of the rows, in [0, 2**63).
    split: "train", "validation" or "test".
    weights: the shares of the data sets in the mixture; () takes their numbers
      of rows.
    shuffle: shuffle each epoch; False keeps the order of the plan, for rows
      that are shuffled already.
    once: give each row once and pad the last batch; False repeats the data,
      epoch after epoch.
    limit: with `once`, the largest number of rows, shared between the data
      sets by the weights; None for all rows.
    cache_dir: the folder of the cached row plans.

  Raises:
    ValueError: a field is outside its range.
  """

  paths: tuple[str, ...]
  layout: Layout
  rows: int
  seed: int = 0
  split: str = "train"
  weights: tuple[float, ...] = ()
  shuffle: bool = True
  once: bool = False
  limit: int | None = None
  cache_dir: Path = CACHE_DIR

  def __post_init__(self) -> None:
    require(self.rows >= 1, "rows", self.rows, "1 or more")
    require(0 <= self.seed < 2**63, "seed", self.seed, "in [0, 2**63)")
    known = self.split in packing.SPLITS
    require(known, "split", self.split, f"one of {packing.SPLITS}")
    some = self.limit is None or self.limit >= 1
    require(some, "limit", self.limit, "None or a number ≥ 1")
    if self.weights:
      sizes = len(self.weights) == len(self.paths)
      expected = f"one for each of {len(self.paths)} paths"
      require(sizes, "weights", self.weights, expected)
      sound = all(0 < x < float("inf") for x in self.weights)
      require(sound, "weights", self.weights, "numbers above 0")

  def __getstate__(self) -> dict[str, Any]:
    # Without the open files: a worker process opens them itself.
    fields = dataclasses.fields(self)
    return {field.name: getattr(self, field.name) for field in fields}

  @property
  def length(self) -> int:
    """The number of input tokens of a row."""
    return self.layout.length

  @property
  def num_batches(self) -> int | None:
    """The number of batches; None if the data is repeated."""
    return -(-int(self._ends[-1]) // self.rows) if self.once else None

  @functools.cached_property
  def fingerprint(self) -> Fingerprint:
    """Return the identity of the layout, the order and each set's files."""
    result: Fingerprint = {
      "data": "text",
      "version": _VERSION,
      **dataclasses.asdict(self.layout),
      "rows": self.rows,
      "seed": self.seed,
      "split": self.split,
      "weights": ", ".join(map(repr, self.weights)),
      "shuffle": int(self.shuffle),
      "once": int(self.once),
      "limit": self.limit or 0,
    }
    for i, part in enumerate(self.parts):
      start = f"path{i}." if len(self.parts) > 1 else ""
      for field, value in part.source.fingerprint.items():
        result[start + field] = value
    return result

  @functools.cached_property
  def parts(self) -> tuple[_Part, ...]:
    """The open data sets and the plans of their rows.

    Raises:
      DataError: one cannot be read, or has no row of this split.
    """
    given = len(self.paths) > 0
    expected = "a prepared folder or a Megatron .idx (--data.path)"
    require(given, "data.path", self.paths, expected)
    return tuple(self._open(path) for path in self.paths)

  def _open(self, path: str) -> _Part:
    """Open one data set and plan its rows."""
    source = open_source(path, self.layout.packing)
    plan = make_plan(source, self.layout, self.split, self.cache_dir)
    if not len(plan):
      # Few long documents may leave a split empty.
      few = self.layout.packing == "stream" and self.split != "train"
      hint = "; held_out='end' holds out the end of the text" if few else ""
      raise DataError(
        f"{path}: no {self.split} row of length + 1 = {self.length + 1} "
        f"tokens: {len(source)} documents of {source.lengths.sum():,} tokens, "
        f"validation={self.layout.validation}, test={self.layout.test}{hint}"
      )
    return _Part(source, plan)

  @functools.cached_property
  def _sizes(self) -> np.ndarray:
    """The number of rows of each data set: int64 (K,)."""
    return np.array([len(part.plan) for part in self.parts])

  @functools.cached_property
  def _shares(self) -> np.ndarray:
    """The places of each data set in a block of the mixture: int64 (K,)."""
    share_K = order.mix_counts(self.weights or tuple(self._sizes.tolist()))
    least = "large enough for one place in 2**16"
    require(share_K.min() > 0, "weights", self.weights, least)
    return share_K

  @functools.cached_property
  def _ends(self) -> np.ndarray:
    """With `once`: the place after the last row of each set, int64 (K,)."""
    size_K = self._sizes
    if self.limit is not None:
      weight_K = np.asarray(self.weights or size_K, np.float64)
      share_K = np.ceil(self.limit * weight_K / weight_K.sum())
      size_K = np.minimum(size_K, share_K.astype(np.int64))
    return np.cumsum(size_K)

  def locate(self, place_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the rows at places of the whole training order.

    Args:
      place_B: step · rows + r, int64.

    Returns:
      The number of the data set, and the row of its plan, both int64 (B,).
    """
    if self.once:
      kept_B = np.minimum(place_B, self._ends[-1] - 1)
      set_B = np.searchsorted(self._ends, kept_B, side="right")
      first_K = self._ends - np.diff(self._ends, prepend=0)
      place_B = kept_B - first_K[set_B]
    elif len(self.parts) == 1:
      set_B = np.zeros_like(place_B)
    else:
      set_B, place_B = order.mix(place_B, self._shares, self.seed)
    seed = _HELD_OUT if self.once else self.seed
    row_B = np.empty_like(place_B)
    for k in np.unique(set_B).tolist():
      size = int(self._sizes[k])
      epoch_B, index_B = np.divmod(place_B, size)
      for epoch in np.unique(epoch_B[set_B == k]).tolist():
        here_B = (set_B == k) & (epoch_B == epoch)
        index_b = index_B[here_B]
        if self.shuffle or self.once:
          index_b = order.permute(index_b, size, seed, k, epoch)
        row_B[here_B] = index_b
    return set_B, row_B

  def place(self, step: int, row: int, name: str, column: int) -> str:
    """Return the data set, document and token of a value of a batch."""
    set_B, row_B = self.locate(np.array([step * self.rows + row]))
    source, plan = self.parts[int(set_B[0])]
    pieces, _ = plan.pieces(row_B)
    place = column + (name == "targets")  # in the row of length + 1 tokens
    piece = int(np.flatnonzero(pieces.place_P <= place)[-1])
    token = int(pieces.start_P[piece]) + place - int(pieces.place_P[piece])
    where = f"document {pieces.document_P[piece]}, token {token}"
    return f"{source.name}: {where} (step {step}, row {row})"

  def read_rows(self, step: int, start: int, stop: int) -> Batch:
    """Return rows of a batch; DataError if a file cannot be read."""
    place_B = step * self.rows + np.arange(start, stop)
    set_B, row_B = self.locate(place_B)
    width = self.length + 1
    tokens_BW = np.empty((len(place_B), width), np.int32)
    segments_BW = None
    if self.layout.packing == "documents":
      segments_BW = np.empty((len(place_B), width), np.int32)
    for k in np.unique(set_B).tolist():
      here_B = np.flatnonzero(set_B == k)
      part = self.parts[k]
      filled = fill_rows(part.source, part.plan, row_B[here_B])
      tokens_BW[here_B] = filled.tokens_RW
      if segments_BW is not None:
        segments_BW[here_B] = filled.segments_RW()
    batch = _batch(tokens_BW, segments_BW)
    if self.once:
      batch["weights"][place_B >= self._ends[-1]] = 0
    return batch


def _batch(tokens_BW: np.ndarray, segments_BW: np.ndarray | None) -> Batch:
  """Make a batch of rows of W = L + 1 tokens; None for rows of a stream."""
  batch = {
    "tokens": tokens_BW[:, :-1].copy(),
    "targets": tokens_BW[:, 1:].copy(),
  }
  if segments_BW is None:
    batch["weights"] = np.ones(batch["tokens"].shape, np.float32)
    return batch
  inner_BT, next_BT = segments_BW[:, :-1], segments_BW[:, 1:]
  real_BT = (inner_BT == next_BT) & (inner_BT > 0)
  batch["weights"] = real_BT.astype(np.float32)
  batch["segment_ids"] = inner_BT.copy()
  return batch
