"""The MQAR data set of the paper, bit for bit, cached on disk.

The rows are those of `train.data.mqar`; the numbers come from the legacy
stream of numpy, which does not change between its versions.
"""

import dataclasses
import functools
import hashlib
import logging
import os
from pathlib import Path
import uuid

import numpy as np

from train.data.batches import Batch, Batches, Fingerprint
from train.data.checks import require
from train.data.mqar import MQARConfig, mqar_rows
from train.data.splitmix64 import hash64

CACHE_DIR = Path.home() / ".cache" / "rebased_jax" / "mqar"
TRAIN_SEED, TRAIN_EXAMPLES = 42, 100_000
TEST_SEED, TEST_EXAMPLES = 52, 3_000

_VERSION = 1
_DIGEST_BYTES = 32
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class MQARPaper(Batches):
  """The paper's examples, epoch after epoch.

  The order of an epoch is a function of (seed, epoch). The examples are read
  from the cache, or made (a minute for 100,000), at the first batch. What the
  last batch of an epoch lacks is filled with copies of an example at weight 0.

  Attributes:
    config: the rows.
    seed: of the order of the examples, in [0, 2**63).
    rows: the rows of one global batch.
    epochs: the number of epochs; the batches do not depend on it.
    drop_last: leave out the incomplete last batch of every epoch.
    shuffle: False keeps the order of the data set in every epoch.
    examples: the number of examples n.
    data_seed: of the examples, in [0, 2**32).
    cache_dir: the directory of the cache.
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
    return self.config.length

  @property
  def steps_per_epoch(self) -> int:
    """The number of batches of one epoch."""
    full, rest = divmod(self.examples, self.rows)
    return full + (rest > 0 and not self.drop_last)

  @property
  def num_batches(self) -> int:
    return self.epochs * self.steps_per_epoch

  @property
  def fingerprint(self) -> Fingerprint:
    """The fields of the config and of the data; not the number of epochs."""
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
    return load_paper_examples(
      self.config, self.examples, self.data_seed, self.cache_dir
    )

  def read_rows(self, step: int, start: int, stop: int) -> Batch:
    epoch, step = divmod(step, self.steps_per_epoch)
    place_B = step * self.rows + np.arange(start, stop)
    index_B = np.minimum(place_B, self.examples - 1)
    if self.shuffle:
      index_B = epoch_order(self.seed, epoch, self.examples)[index_B]
    batch = mqar_rows(self.config, *self._parts[:, index_B])
    batch["weights"][place_B >= self.examples] = 0
    return batch


def paper_test_batches(
  config: MQARConfig, *, rows: int = 512, cache_dir: Path = CACHE_DIR
) -> MQARPaper:
  """The paper's 3,000 test rows once and in order, the last batch padded."""
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
  """The order of the examples in an epoch: int64 (n,), read-only."""
  hash_n = hash64(seed, epoch, np.arange(examples))
  order_n = np.argsort(hash_n, kind="stable")
  order_n.flags.writeable = False
  return order_n


def paper_examples(config: MQARConfig, examples: int, seed: int) -> np.ndarray:
  """Makes the examples of the paper: it trains on seed 42, tests on 52.

  The legacy stream draws the keys of all rows, then their values, then their
  gaps.

  Args:
    config: the rows.
    examples: the number of rows n.
    seed: in [0, 2**32).

  Returns:
    int32 (3, n, N): keys, values and gaps in drawing order.
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
  """`paper_examples`, kept in a file of `cache_dir`.

  A file that is truncated, damaged or of other contents is made again. A file
  appears whole or not at all, so processes may share the directory.

  Returns:
    int32 (3, n, N), read-only and mapped from the file.

  Raises:
    OSError: the directory cannot be written.
  """
  path = Path(cache_dir) / (
    f"mqar{_VERSION}-v{config.vocab_size}-t{config.length}-n{config.pairs}"
    f"-p{config.power!r}-x{examples}-s{seed}.npy"
  )
  shape = (3, examples, config.pairs)
  parts = _load(path, shape)
  if parts is None:
    _log.info("making %d MQAR examples for %s", examples, path)
    _save(path, paper_examples(config, examples, seed))
    parts = _load(path, shape)
  if parts is None:
    raise OSError(f"{path} is damaged right after it was written")
  return parts


def _load(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
  """The mapped array of a sound file, else None."""
  if not path.exists():
    return None
  if path.stat().st_size > _DIGEST_BYTES:
    content = np.memmap(path, np.uint8, "r")
    body, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if _checksum(path, body) == digest.tobytes():
      parts = np.load(path, mmap_mode="r", allow_pickle=False)
      if parts.shape == shape and parts.dtype == np.int32:
        return np.asarray(parts)
  _log.warning("%s is damaged and will be made again", path)
  return None


def _save(path: Path, parts: np.ndarray) -> None:
  """Writes the array and a checksum, and only then gives the file its name."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
  try:
    with open(temporary, "wb") as file:
      np.save(file, parts)
      file.flush()
      file.write(_checksum(path, np.memmap(temporary, np.uint8, "r")))
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def _checksum(path: Path, body: np.ndarray) -> bytes:
  """The checksum of a file, over its name, which tells its contents, too."""
  checksum = hashlib.sha256(path.name.encode())
  checksum.update(body)
  return checksum.digest()
