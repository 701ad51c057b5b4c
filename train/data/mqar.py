"""Multi-query associative recall (MQAR): its rows, and an unlimited stream.

A row lists N key-value pairs. Then it asks for every key once, at random gaps
in a filler of zeros. The target of a query is its value. It is predicted at the
position of the query and is not itself in the row. With a vocabulary of 32,
T = 16 tokens and N = 2 pairs:

    position   0  1  2  3 | 4  5  6  7  8  9 10 11 12 13 14 15
    token     10 17 12 29 |10  0 12  0  0  0  0  0  0  0  0  0
    target     .  .  .  . |17  . 29  .  .  .  .  .  .  .  .  .
              k0 v0 k1 v1  gap 0 gap 1 gap 2 ...

    positions [4, 6]   targets [17, 29]   weights [1, 1]

Keys are drawn from 1..V//2-1 and values from V//2..V-1, each without
replacement. Gap g is two tokens wide and starts at 2 N + 2 g. The N gaps of a
row are drawn in turn without replacement, P(g) ∝ (g + 1)^(power − 1).
"""

import dataclasses

import numpy as np

from train.data.batches import Batch, Batches, Fingerprint
from train.data.checks import require
from train.data.splitmix64 import hash64, hash64_slots

SPLITS = ("train", "test")

_VERSION = 1  # of the rows; raise it when they change
_MAX_DRAWS = 512  # draws of a pair list until it belongs to the split
_BLOCK = 1 << 17  # hashes that are sorted at a time
_KEYS, _VALUES, _GAPS = range(3)


@dataclasses.dataclass(frozen=True)
class MQARConfig:
  """The shape of an MQAR row.

  Attributes:
    vocab_size: V, larger than `length`.
    length: T, the tokens of a row, an even number.
    pairs: N, the pairs of a row, at most a quarter of `length`, so that there
      are always enough keys and values.
    power: the exponent of the gaps; small values favour early gaps.

  Raises:
    ValueError: there is no such row.
  """

  vocab_size: int = 8192
  length: int = 128
  pairs: int = 16
  power: float = 0.01

  def __post_init__(self) -> None:
    for field in ("vocab_size", "length", "pairs"):
      value = getattr(self, field)
      positive = isinstance(value, int) and value >= 1
      require(positive, field, value, "a positive integer")
    T = self.length
    require(T % 2 == 0, "length", T, "an even number")
    limit = f"at most length/4={T // 4}"
    require(4 * self.pairs <= T, "pairs", self.pairs, limit)
    limit = f"more than length={T}"
    require(self.vocab_size > T, "vocab_size", self.vocab_size, limit)
    finite = 0 < self.power < float("inf")
    require(finite, "power", self.power, "a positive number")

  @property
  def num_keys(self) -> int:
    """The number of key tokens: 1..num_keys."""
    return self.vocab_size // 2 - 1

  @property
  def num_values(self) -> int:
    """The number of value tokens: first_value..vocab_size-1."""
    return self.vocab_size - self.first_value

  @property
  def first_value(self) -> int:
    """The smallest value token."""
    return self.vocab_size // 2

  @property
  def num_gaps(self) -> int:
    """The number G of gaps in which a query may stand."""
    return (self.length - 2 * self.pairs) // 2

  def gap_weights(self) -> np.ndarray:
    """Return the weights of the gaps, not normalised: float64 (G,)."""
    return np.arange(1, self.num_gaps + 1) ** (self.power - 1.0)


def mqar_rows(
  config: MQARConfig,
  keys_BN: np.ndarray,
  values_BN: np.ndarray,
  gaps_BN: np.ndarray,
) -> Batch:
  """Lay out rows from their keys, values and gaps.

  Args:
    config: the shape of a row.
    keys_BN: the keys in the order in which they were drawn, integers.
    values_BN: the value of each key.
    gaps_BN: the gap of each key's query.

  Returns:
    tokens int32 (B, T), positions int32 (B, N) ascending, targets int32
    (B, N) and weights float32 (B, N), all ones.
  """
  B, N = keys_BN.shape
  tokens_BT = np.zeros((B, config.length), np.int32)
  tokens_BT[:, 0 : 2 * N : 2] = keys_BN
  tokens_BT[:, 1 : 2 * N : 2] = values_BN
  order_BN = np.argsort(gaps_BN, axis=1)

  def sort(x_BN: np.ndarray) -> np.ndarray:
    return np.take_along_axis(x_BN, order_BN, axis=1)

  positions_BN = 2 * N + 2 * sort(gaps_BN)
  np.put_along_axis(tokens_BT, positions_BN, sort(keys_BN), axis=1)
  return {
    "tokens": tokens_BT,
    "positions": positions_BN.astype(np.int32),
    "targets": sort(values_BN).astype(np.int32),
    "weights": np.ones((B, N), np.float32),
  }


@dataclasses.dataclass(frozen=True)
class MQARStream(Batches):
  """An unlimited stream of MQAR rows: example i depends on (seed, split, i).

  Row r of the batch at step s is example s * rows + r. A hash of a pair list
  decides its split, so that streams of different splits never share a pair
  list, whatever their seeds. One in eight belongs to the test split.

  Attributes:
    config: the shape of a row.
    seed: the seed, in [0, 2**63).
    rows: the number of rows of one global batch.
    split: "train" or "test".
    examples: the number of examples; None for no end. The last batch is filled
      up with copies of the last example at weight 0.

  Raises:
    ValueError: a field is out of range.
  """

  config: MQARConfig
  seed: int
  rows: int
  split: str = "train"
  examples: int | None = None

  def __post_init__(self) -> None:
    require(0 <= self.seed < 2**63, "seed", self.seed, "in [0, 2**63)")
    require(self.rows >= 1, "rows", self.rows, "1 or more")
    known = self.split in SPLITS
    require(known, "split", self.split, f"one of {SPLITS}")
    some = self.examples is None or self.examples >= 1
    require(some, "examples", self.examples, "None or a number ≥ 1")

  @property
  def length(self) -> int:
    """The number of tokens of a row."""
    return self.config.length

  @property
  def num_batches(self) -> int | None:
    """The number of batches; None if there is no end."""
    return None if self.examples is None else -(-self.examples // self.rows)

  @property
  def fingerprint(self) -> Fingerprint:
    """The fields of the config and of the stream; `examples` is 0 for none."""
    return {
      "data": "mqar-stream",
      "version": _VERSION,
      **dataclasses.asdict(self.config),
      "seed": self.seed,
      "rows": self.rows,
      "split": self.split,
      "examples": self.examples or 0,
    }

  def read_rows(self, step: int, start: int, stop: int) -> Batch:
    """Return rows of a batch."""
    index_B = step * self.rows + np.arange(start, stop)
    if self.examples is None:
      parts = stream_examples(self.config, self.seed, self.split, index_B)
      return mqar_rows(self.config, *parts)
    kept_B = np.minimum(index_B, self.examples - 1)
    parts = stream_examples(self.config, self.seed, self.split, kept_B)
    batch = mqar_rows(self.config, *parts)
    batch["weights"][index_B >= self.examples] = 0
    return batch


def stream_test_batches(
  config: MQARConfig, *, seed: int, examples: int, rows: int
) -> MQARStream:
  """Return batches of the first test rows of a stream, the last one padded.

  Args:
    config: the shape of a row.
    seed: the seed of the stream.
    examples: the number of test rows.
    rows: the number of rows of one global batch.
  """
  return MQARStream(config, seed, rows, split="test", examples=examples)


def stream_examples(
  config: MQARConfig, seed: int, split: str, index_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Return examples of a stream; each depends only on its own index.

  Args:
    config: the shape of a row.
    seed: the seed of the stream.
    split: "train" or "test".
    index_B: the numbers of the examples.

  Returns:
    Keys, values and gaps, each int64 (B, N), in the order of drawing.

  Raises:
    ValueError: no pair list of the split was found in 512 draws, because the
      vocabulary is so small that there are hardly any.
  """
  B, N = len(index_B), config.pairs
  base_B = hash64(seed, SPLITS.index(split), index_B)
  keys_BN, values_BN = np.empty((2, B, N), np.int64)
  open_R = np.arange(B)
  for draw in range(_MAX_DRAWS):
    key_state_R = hash64(base_B[open_R], _KEYS, draw)
    value_state_R = hash64(base_B[open_R], _VALUES, draw)
    keys_RN = 1 + _distinct(key_state_R, config.num_keys, N)
    values_RN = config.first_value + _distinct(
      value_state_R, config.num_values, N
    )
    fits_R = in_test_split(keys_RN, values_RN) == (split == "test")
    keys_BN[open_R[fits_R]] = keys_RN[fits_R]
    values_BN[open_R[fits_R]] = values_RN[fits_R]
    open_R = open_R[~fits_R]
    if not open_R.size:
      return keys_BN, values_BN, _gaps(hash64(base_B, _GAPS), config)
  raise ValueError(
    f"split={split!r}: no pair list belongs to it in {_MAX_DRAWS} draws from "
    f"vocab_size={config.vocab_size} and pairs={N}: expected a larger "
    "vocab_size"
  )


def in_test_split(keys_BN: np.ndarray, values_BN: np.ndarray) -> np.ndarray:
  """Return whether pair lists belong to the test split: bool (B,).

  Args:
    keys_BN: the keys, in the order of drawing.
    values_BN: the value of each key.
  """
  slots_N = np.arange(keys_BN.shape[1])
  pair_BN = hash64(slots_N, keys_BN, values_BN)
  return hash64(pair_BN.sum(axis=1, dtype=np.uint64)) % np.uint64(8) == 0


def _distinct(state_B: np.ndarray, slots: int, count: int) -> np.ndarray:
  """Draw `count` distinct slots for each state, in random order.

  These are the slots with the smallest hashes, ordered by hash. The low bits of
  each hash are replaced by its slot. So sorting the values sorts the slots too,
  and there are no ties.

  Args:
    state_B: the state of each row's generator, uint64.
    slots: the number of slots to draw from.
    count: the number of slots to draw.

  Returns:
    int64 (B, count).
  """
  mask = np.uint64((1 << slots.bit_length()) - 1)
  slot_S = np.arange(slots, dtype=np.uint64)
  rows = max(1, _BLOCK // slots)
  chosen = []
  for first in range(0, len(state_B), rows):
    hash_BS = hash64_slots(state_B[first : first + rows], slots)
    np.bitwise_and(hash_BS, ~mask, out=hash_BS)
    np.bitwise_or(hash_BS, slot_S, out=hash_BS)
    hash_BS.partition(count - 1, axis=1)
    chosen.append(np.sort(hash_BS[:, :count], axis=1) & mask)
  return np.concatenate(chosen).astype(np.int64)


def _gaps(state_B: np.ndarray, config: MQARConfig) -> np.ndarray:
  """Draw the gaps of each row in turn without replacement: int64 (B, N).

  Each gap of weight w gets an exponential time of rate w, and the N gaps with
  the smallest times are the draws (Gumbel top-k, on a log scale).
  """
  hash_BG = hash64_slots(state_B, config.num_gaps)
  uniform_BG = ((hash_BG >> np.uint64(11)) + 0.5) * 2.0**-53
  time_BG = -np.log(uniform_BG) / config.gap_weights()
  return np.argsort(time_BG, axis=1, kind="stable")[:, : config.pairs]
