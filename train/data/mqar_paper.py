"""The MQAR data set of the paper, bit-identical, cached on disk.

The rows have the layout of `train.data.mqar`. The random numbers come from
NumPy's legacy generator, which gives the same numbers in all its versions.
"""

import dataclasses
import functools
import hashlib
import logging
from pathlib import Path

import numpy as np

from rebased_jax.atomic import named_array_errors, replacing, sync
from train.data.batches import Batch, Batches, Fingerprint
from train.data.cache_folder import cache_folder
from train.data.checks import require
from train.data.mqar import MQARConfig, mqar_rows
from train.data.one_maker import one_maker
from train.data.splitmix64 import hash64

CACHE_DIR = cache_folder("mqar")
TRAIN_SEED, TRAIN_EXAMPLES = 42, 100_000
TEST_SEED, TEST_EXAMPLES = 52, 3_000

_VERSION = 1  # of the examples; raise it when they change
_DIGEST_BYTES = 32  # a SHA-256 at the end of a cache file
_DTYPES = (np.uint16, np.int32)  # of a cache file; earlier ones have int32
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class MQARPaper(Batches):
  """The paper's examples, repeated in epochs.

  The order of an epoch depends on (seed, epoch). The first batch reads the
  examples from the cache, or makes them, which takes a minute for 100,000. The
  last batch of an epoch is filled up with copies of an example at weight 0.

  Attributes:
    config: the shape of a row.
    seed: the seed of the order, in [0, 2**63).
    rows: the number of rows of one global batch.
    epochs: the number of epochs; the batches do not depend on it.
    drop_last: leave out the incomplete last batch of every epoch.
    shuffle: shuffle every epoch; False keeps the order of the data set.
    examples: the number n of examples.
    data_seed: the seed of the examples, in [0, 2**32).
    cache_dir: the folder of the cache.

  Raises:
    ValueError: a field is out of range.
  """

  config: MQARConfig
  seed: int = 0
  rows: int = 512
  epochs: int = 64
  drop_last: bool = False
  shuffle: bool = True
  examples: int = TRAIN_EXAMPLES
  data_seed: int = TRAIN_SEED
  cache_dir: Path = CACHE_DIR

  def __post_init__(self) -> None:
    for field in ("rows", "epochs", "examples"):
      value = getattr(self, field)
      require(value >= 1, field, value, "1 or more")
    require(0 <= self.seed < 2**63, "seed", self.seed, "in [0, 2**63)")
    legacy = 0 <= self.data_seed < 2**32
    require(legacy, "data_seed", self.data_seed, "in [0, 2**32)")
    limit = f"at most examples={self.examples} with drop_last"
    require(self.steps_per_epoch >= 1, "rows", self.rows, limit)

  @property
  def length(self) -> int:
    """The number of tokens of a row."""
    return self.config.length

  @property
  def steps_per_epoch(self) -> int:
    """The number of batches of one epoch."""
    full, rest = divmod(self.examples, self.rows)
    return full + (rest > 0 and not self.drop_last)

  @property
  def num_batches(self) -> int:
    """The number of batches of all epochs."""
    return self.epochs * self.steps_per_epoch

  @property
  def fingerprint(self) -> Fingerprint:
    """The fields of the config and of the data, without the epochs."""
    return {
      "data": "mqar-paper",
      "version": _VERSION,
      **dataclasses.asdict(self.config),
      "seed": self.seed,
      "rows": self.rows,
      "drop_last": int(self.drop_last),
      "shuffle": int(self.shuffle),
      "examples": self.examples,
      "data_seed": self.data_seed,
    }

  @functools.cached_property
  def _parts(self) -> np.ndarray:
    """The keys, values and gaps of all examples: integers (3, n, N)."""
    return load_paper_examples(
      self.config, self.examples, self.data_seed, self.cache_dir
    )

  def read_rows(self, step: int, start: int, stop: int) -> Batch:
    """Return rows of a batch; OSError if the cache cannot be written."""
    epoch, step = divmod(step, self.steps_per_epoch)
    place_B = step * self.rows + np.arange(start, stop)
    index_B = np.minimum(place_B, self.examples - 1)
    if self.shuffle:
      index_B = epoch_order(self.seed, epoch, self.examples)[index_B]
    parts = self._parts[:, index_B].astype(np.int32)
    batch = mqar_rows(self.config, *parts)
    batch["weights"][place_B >= self.examples] = 0
    return batch


def paper_test_batches(
  config: MQARConfig, *, rows: int = 512, cache_dir: Path = CACHE_DIR
) -> MQARPaper:
  """Return batches of the paper's 3,000 test rows, the last one padded.

  Args:
    config: the shape of a row.
    rows: the number of rows of one global batch.
    cache_dir: the folder of the cache.
  """
  return MQARPaper(
    config,
    rows=rows,
    epochs=1,
    shuffle=False,
    examples=TEST_EXAMPLES,
    data_seed=TEST_SEED,
    cache_dir=cache_dir,
  )


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, examples: int) -> np.ndarray:
  """Return the order of the examples in an epoch: int64 (n,), read-only.

  Args:
    seed: the seed of the order.
    epoch: the number of the epoch.
    examples: the number n of examples.
  """
  hash_n = hash64(seed, epoch, np.arange(examples))
  order_n = np.argsort(hash_n, kind="stable")
  order_n.flags.writeable = False
  return order_n


def paper_examples(config: MQARConfig, examples: int, seed: int) -> np.ndarray:
  """Make the examples of the paper, which trains on seed 42 and tests on 52.

  The legacy generator draws the keys of all rows, then their values, then their
  gaps.

  Args:
    config: the shape of a row.
    examples: the number n of rows.
    seed: the seed of the generator, in [0, 2**32).

  Returns:
    Keys, values and gaps in the order of drawing, int32 (3, n, N).
  """
  random = np.random.RandomState(seed)
  weights = config.power * config.gap_weights()
  tables = (
    (np.arange(1, config.first_value), None),
    (np.arange(config.first_value, config.vocab_size), None),
    (np.arange(config.num_gaps), weights / weights.sum()),
  )
  parts = np.empty((3, examples, config.pairs), np.int32)
  for part_nN, (table, odds) in zip(parts, tables, strict=True):
    for i in range(examples):
      part_nN[i] = random.choice(table, config.pairs, replace=False, p=odds)
  return parts


def load_paper_examples(
  config: MQARConfig, examples: int, seed: int, cache_dir: Path = CACHE_DIR
) -> np.ndarray:
  """Return what `paper_examples` returns, from a cache file if there is one.

  A file that is truncated, damaged or has another content is made again. A file
  appears whole or not at all, so that processes may share the folder.

  Args:
    config: the shape of a row.
    examples: the number n of rows.
    seed: the seed of the generator.
    cache_dir: the folder of the cache.

  Returns:
    Integers (3, n, N), read-only and memory-mapped from the file: uint16, or
    int32 where the vocabulary has more than 65,536 tokens.

  Raises:
    OSError: the folder cannot be written.
  """
  path = Path(cache_dir) / (
    f"mqar{_VERSION}-v{config.vocab_size}-t{config.length}-n{config.pairs}"
    f"-p{config.power!r}-x{examples}-s{seed}.npy"
  )
  shape = (3, examples, config.pairs)
  parts = _load(path, shape)
  if parts is None:
    with one_maker(path.parent):
      parts = _load(path, shape)  # another process may have made it
      if parts is None:
        _log.info("making %d MQAR examples for %s", examples, path)
        small = config.vocab_size <= 1 << 16
        made = paper_examples(config, examples, seed)
        _save(path, made.astype(np.uint16) if small else made)
        parts = _load(path, shape)
  if parts is None:
    raise OSError(f"{path} is damaged right after it was written")
  return parts


def _load(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
  """Return the memory-mapped array of a file; None if it is not sound."""
  if not path.exists():
    return None
  if path.stat().st_size > _DIGEST_BYTES:
    content = np.memmap(path, np.uint8, "r")
    body, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if _checksum(path, body) == digest.tobytes():
      parts = np.load(path, mmap_mode="r", allow_pickle=False)
      if parts.shape == shape and parts.dtype in _DTYPES:
        return np.asarray(parts)
  _log.warning("%s is damaged and will be made again", path)
  return None


def _save(path: Path, parts: np.ndarray) -> None:
  """Write the array, and a checksum after it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with replacing(path) as temporary:
    with named_array_errors(path), open(temporary, "wb") as file:
      np.save(file, parts)
      file.flush()
      file.write(_checksum(path, np.memmap(temporary, np.uint8, "r")))
    sync(temporary)


def _checksum(path: Path, body: np.ndarray) -> bytes:
  """Return a checksum of a file's name and content; the name has the seed."""
  checksum = hashlib.sha256(path.name.encode())
  checksum.update(body)
  return checksum.digest()
