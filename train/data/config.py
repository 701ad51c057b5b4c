"""The data part of a run's config: the sources of its batches.

`DataConfig` is the interface. To train on data of your own, subclass it and
`train.data.batches.Batches` in a module of yours. The run folder stores the
class as `module:Class`.
"""

import abc
from collections.abc import Mapping, Sequence
import dataclasses
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Self

from rebased_jax.config_checks import make_scalars_plain
from rebased_jax.config_help import with_help
from rebased_jax.field_types import fits
from train.data import mqar, mqar_paper
from train.data.batches import Batch, Batches
from train.data.checks import absolute, require
from train.data.text import bigram_counts, lm_batches
from train.data.text.packing_cache import CACHE_DIR
from train.data.text.rows import HeldOut, Layout, Packing, open_source
from train.data.text.token_source import DataError, TokenSource

#: What counts as associative recall; see `train.data.recall`.
Recall = Literal["unigram", "bigram", "trigram"]
RECALLS: tuple[Recall, ...] = ("unigram", "bigram", "trigram")  # n = 1, 2, 3


class Field(NamedTuple):
  """One array of a batch.

  Attributes:
    shape: its shape, with the rows first.
    dtype: the name of its dtype, such as "int32".
  """

  shape: tuple[int, ...]
  dtype: str


class DataConfig(abc.ABC):
  """Abstract base: the source of a run's batches.

  A subclass is a frozen dataclass. It must give, in this order of importance:

  - `length`, the number of input tokens of a row;
  - `vocab_size`;
  - `train_batches(rows, seed)` and `eval_batches(rows, seed)`, the batches;
  - `targets`, if a row does not have one target for each token;
  - `fields(rows)`, if the arrays should be known without reading a batch;
  - `with_absolute_paths()`, if it has paths.

  `workers`, `timeout` and `recall` have defaults. Declare one as a field of
  the dataclass to let users change it. A subclass that
  defines `__post_init__` must call `super().__post_init__()`, which checks
  these values.
  """

  #: The number of input tokens of a row.
  length: int
  #: The vocabulary size; None if only the files know it.
  vocab_size: int | None
  #: The number of processes that read ahead; 0 for a thread.
  workers: int = 0
  #: Seconds that training waits for a batch; None for no limit.
  timeout: float | None = 600.0
  #: Which targets evaluation counts as associative recall, see
  #: `train/data/recall.py`; None for none.
  recall: Recall | None = None
  #: Whether perplexity is reported, as for text.
  perplexity: ClassVar[bool] = False

  def __post_init__(self) -> None:
    """Check the values that all data configs have.

    Raises:
      ValueError: a value is out of range.
    """
    if dataclasses.is_dataclass(self):
      make_scalars_plain(self)
    whole = fits(self.length, int) and self.length >= 1
    require(whole, "data.length", self.length, "a positive integer")
    size = self.vocab_size
    known = size is None or (fits(size, int) and size >= 1)
    require(known, "data.vocab_size", size, "None or an integer ≥ 1")
    whole = fits(self.workers, int) and self.workers >= 0
    require(whole, "data.workers", self.workers, "0 or more")
    some = self.timeout is None or self.timeout > 0
    expected = "None or a number of seconds above 0"
    require(some, "data.timeout", self.timeout, expected)
    known = self.recall in (None, *RECALLS)
    require(known, "data.recall", self.recall, f"None or one of {RECALLS}")

  @property
  def targets(self) -> int:
    """The number of targets of a row; one for each token by default."""
    return self.length

  @abc.abstractmethod
  def train_batches(self, rows: int, seed: int) -> Batches:
    """Return the training batches.

    Args:
      rows: the number of rows of one global batch.
      seed: decides the order, and the rows if they are random.
    """

  @abc.abstractmethod
  def eval_batches(self, rows: int, seed: int) -> Batches:
    """Return the held-out batches; there must be finitely many.

    Args:
      rows: the number of rows of one global batch. Rows that fill up the last
        batch have weight 0.
      seed: the seed of the run.
    """

  def test_batches(self, rows: int, seed: int) -> Batches:
    """Return the batches of the test split, for `rebased evaluate --test`.

    Args:
      rows: the number of rows of one global batch.
      seed: the seed of the run.

    Raises:
      ValueError: there is no test split, which is the default.
    """
    raise ValueError(
      f"{type(self).__name__} has no test split beside its held-out rows"
    )

  def fields(self, rows: int) -> dict[str, Field]:
    """Return the arrays of a training batch, by name.

    By default this reads one row. A subclass whose data may be absent, for
    example when a step is only compiled, should override it.

    Args:
      rows: the number of rows of one global batch.
    """
    batch = self.train_batches(rows, 0).read(0, slice(0, 1))
    return {
      name: Field((rows, *array.shape[1:]), str(array.dtype))
      for name, array in batch.items()
    }

  def eval_fields(self, rows: int) -> dict[str, Field]:
    """Return the arrays of a held-out batch, by name; as `fields` by default.

    Args:
      rows: the number of rows of one global batch.
    """
    return self.fields(rows)

  def read_vocab_size(self) -> int | None:
    """Return the vocabulary size, reading it from the files if necessary."""
    return self.vocab_size

  def with_absolute_paths(self) -> Self:
    """Return this config with paths for any working directory.

    A run stores the result, so that it can be resumed from elsewhere. By
    default there are no paths. A subclass that has some should override it.
    """
    return self

  def check_files(self, vocab_size: int) -> None:  # noqa: B027
    """Check the data's files before training, beyond a first batch.

    Whether tokens are in the vocabulary is checked for every batch that is
    read. A subclass may find out earlier. The default does nothing.

    Args:
      vocab_size: the vocabulary size V of the model.

    Raises:
      ValueError: a file is damaged, or some token is not in [0, V).
    """


# What training reads. Other arrays have the dtype that `fields` says.
_DTYPES = {
  "tokens": "int32",
  "positions": "int32",
  "targets": "int32",
  "segment_ids": "int32",
  "weights": "float32",
}


def check_batch(batch: Batch, fields: Mapping[str, Field], source: str) -> None:
  """Check that a batch has the arrays that its config announces.

  Args:
    batch: the batch.
    fields: what `DataConfig.fields` returns for its number of rows.
    source: where the batch comes from, for the message.

  Raises:
    ValueError: an array is missing, or has another shape or dtype, or a dtype
      that training does not read.
  """
  if batch.keys() != fields.keys():
    raise ValueError(
      f"{source}: a batch has the arrays {sorted(batch)}: expected "
      f"{sorted(fields)}, as `fields` says"
    )
  for name, field in fields.items():
    array = batch[name]
    dtype = _DTYPES.get(name, str(array.dtype))
    if str(array.dtype) != dtype:
      raise ValueError(
        f"{source}: {name} is {array.dtype}{list(array.shape)}: expected "
        f"{dtype}{list(field.shape)}: {name} is {dtype} in every batch"
      )
    if (array.shape, str(array.dtype)) != tuple(field):
      raise ValueError(
        f"{source}: {name} is {array.dtype}{list(array.shape)}: expected "
        f"{field.dtype}{list(field.shape)}, as `fields` says"
      )


@with_help
@dataclasses.dataclass(frozen=True)
class MQARData(DataConfig):
  """Abstract: multi-query associative recall, in rows of one shape."""

  #: The vocabulary size. One half are keys, the other half values.
  vocab_size: int = 8192
  #: The tokens of a row.
  length: int = 128
  #: The key-value pairs of a row, each of which is asked for once.
  pairs: int = 16
  #: The exponent of the gaps between queries; small values favour early gaps.
  power: float = 0.01

  def __post_init__(self) -> None:
    super().__post_init__()
    self.rows()  # raises if there are no such rows

  @property
  def targets(self) -> int:
    """The number of targets of a row: one for each pair."""
    return self.pairs

  def rows(self) -> mqar.MQARConfig:
    """Return the shape of a row; ValueError if it is impossible."""
    return mqar.MQARConfig(self.vocab_size, self.length, self.pairs, self.power)

  def fields(self, rows: int) -> dict[str, Field]:
    """Return the arrays of a batch, by name."""
    predicted = (rows, self.pairs)
    return {
      "tokens": Field((rows, self.length), "int32"),
      "positions": Field(predicted, "int32"),
      "targets": Field(predicted, "int32"),
      "weights": Field(predicted, "float32"),
    }


@with_help
@dataclasses.dataclass(frozen=True)
class MQARStreamData(MQARData):
  """Unlimited MQAR: example i is a function of (seed, i)."""

  #: The vocabulary size. One half are keys, the other half values.
  vocab_size: int = 256
  #: The tokens of a row.
  length: int = 32
  #: The key-value pairs of a row, each of which is asked for once.
  pairs: int = 4
  #: The number of held-out rows.
  test_examples: int = 2048

  def __post_init__(self) -> None:
    super().__post_init__()
    some = self.test_examples >= 1
    require(some, "data.test_examples", self.test_examples, "≥ 1")

  def train_batches(self, rows: int, seed: int) -> Batches:
    """Return the training batches, without an end."""
    return mqar.MQARStream(self.rows(), seed, rows)

  def eval_batches(self, rows: int, seed: int) -> Batches:
    """Return the batches of the test rows."""
    return mqar.stream_test_batches(
      self.rows(), seed=seed, examples=self.test_examples, rows=rows
    )


@with_help
@dataclasses.dataclass(frozen=True)
class MQARPaperData(MQARData):
  """The paper's MQAR: 100,000 training and 3,000 test rows for all seeds."""

  #: The number of training rows.
  examples: int = 100_000
  #: How often the training rows are repeated.
  epochs: int = 64
  #: Leave out an epoch's incomplete last batch, as the paper does for
  #: length ≥ 512.
  drop_last: bool = False

  def __post_init__(self) -> None:
    super().__post_init__()
    self.train_batches(1, 0)  # raises if there are no such examples

  def train_batches(self, rows: int, seed: int) -> Batches:
    """Return the batches of all epochs."""
    return mqar_paper.MQARPaper(
      self.rows(),
      seed=seed,
      rows=rows,
      epochs=self.epochs,
      drop_last=self.drop_last,
      examples=self.examples,
    )

  def eval_batches(self, rows: int, seed: int) -> Batches:
    """Return the batches of the test rows."""
    return mqar_paper.paper_test_batches(self.rows(), rows=rows)


@with_help
@dataclasses.dataclass(frozen=True)
class TextData(DataConfig):
  """Text as tokens: data sets of `rebased prepare`, or in Megatron's format.

  The three packings are described in `train/data/text/packing.py`. Held-out
  rows come from documents that are in no training row, or, with
  `held_out="end"`, from the end of the text.
  """

  #: Folders of `rebased prepare`, or Megatron indices NAME.idx.
  path: tuple[str, ...] = ()
  #: The share of each path in the mixture. Empty: by their numbers of rows.
  weights: tuple[float, ...] = ()
  #: The inputs of a row. A row has one token more.
  length: int = 256
  #: How documents become rows: "stream" concatenates them and cuts; "documents"
  #: packs whole documents, and attention and state end at their boundaries;
  #: "rows" takes documents of length + 1 tokens as they are.
  packing: Packing = "stream"
  #: The fraction that is held out for validation.
  validation: float = 0.01
  #: The fraction that is held out for `rebased evaluate --test`.
  test: float = 0.0
  #: What is held out of a stream: "documents", or the "end" of the text if
  #: there are few documents.
  held_out: HeldOut = "documents"
  #: Data sets to evaluate on, instead of a part of the paths.
  eval_path: tuple[str, ...] = ()
  #: The largest number of held-out rows. None: all.
  eval_rows: int | None = 1024
  #: Shuffle the rows. False keeps the order of the files.
  shuffle: bool = True
  #: The number of processes that read ahead; 0 for a thread.
  workers: int = 0
  #: Read every shard before training, and compare its SHA-256 with the one in
  #: dataset.json.
  verify: bool = False
  #: The folder of cached row plans. None: ~/.cache/rebased_jax/plans.
  cache_dir: str | None = None
  #: Seconds that training waits for a batch. None: no limit.
  timeout: float | None = 600.0
  #: Which targets evaluation counts as associative recall: those whose token
  #: ("unigram"), bigram or trigram occurred before in their row. None: none.
  recall: Recall | None = "bigram"
  #: A bigram that occurs more often than this in the training text is not
  #: associative recall. `rebased count` makes the counts. None: no limit.
  recall_limit: int | None = None

  perplexity: ClassVar[bool] = True

  def __post_init__(self) -> None:
    for field in ("path", "eval_path", "weights"):
      value = getattr(self, field)
      require(isinstance(value, tuple), f"data.{field}", value, "a tuple")
    super().__post_init__()
    self.train_batches(1, 0)  # raises if there are no such rows
    is_bool = isinstance(self.verify, bool)
    require(is_bool, "data.verify", self.verify, "True or False")
    rows = self.eval_rows
    some = rows is None or rows >= 1
    require(some, "data.eval_rows", rows, "None or a number ≥ 1")
    limit, expected = self.recall_limit, "None, or 0 or more"
    whole = limit is None or (fits(limit, int) and limit >= 0)
    require(whole, "data.recall_limit", limit, expected)
    bigrams = limit is None or self.recall == "bigram"
    expected += " with data.recall='bigram'"
    require(bigrams, "data.recall_limit", limit, expected)
    if self.eval_path:
      none = self.validation == 0
      expected = f"0 with data.eval_path={self.eval_path!r}"
      require(none, "data.validation", self.validation, expected)
    else:
      some = self.validation > 0
      expected = "above 0, or a data.eval_path"
      require(some, "data.validation", self.validation, expected)

  def with_absolute_paths(self) -> Self:
    """Return this config with paths for any working directory."""
    cache = self.cache_dir
    return dataclasses.replace(
      self,
      path=tuple(absolute(path) for path in self.path),
      eval_path=tuple(absolute(path) for path in self.eval_path),
      cache_dir=None if cache is None else absolute(cache),
    )

  @property
  def vocab_size(self) -> None:
    """None: the files know it; see `read_vocab_size`."""
    return

  def read_vocab_size(self) -> int | None:
    """Return the largest vocabulary size of the data sets.

    Returns:
      None if no data set says it, as in Megatron's format.

    Raises:
      DataError: a data set cannot be read, or their tokenizers differ.
    """
    paths = (*self.path, *self.eval_path)
    sources = [open_source(path, self.packing) for path in paths]
    _check_tokenizers(sources)
    sizes = [source.vocab_size for source in sources]
    return max((size for size in sizes if size is not None), default=None)

  def check_files(self, vocab_size: int) -> None:
    """Look for tokens outside a model's vocabulary, and verify the files.

    Args:
      vocab_size: the vocabulary size V of the model.

    Raises:
      DataError: some token is not in [0, V), a data set cannot be read, or
        `verify` is set and a shard changed since it was made.
    """
    for path in (*self.path, *self.eval_path):
      source = open_source(path, self.packing)
      source.check_tokens(vocab_size)
      if self.verify:
        source.verify()

  def fields(self, rows: int) -> dict[str, Field]:
    """Return the arrays of a training batch, by name; reads no file."""
    tokens = Field((rows, self.length), "int32")
    fields = {"tokens": tokens, "targets": tokens}
    if self.packing == "documents":
      fields["segment_ids"] = tokens
    return {**fields, "weights": Field((rows, self.length), "float32")}

  def eval_fields(self, rows: int) -> dict[str, Field]:
    """Return the arrays of a held-out batch, by name; reads no file."""
    fields = self.fields(rows)
    if self.recall_limit is not None:
      fields["rare"] = fields["weights"]
    return fields

  def train_batches(self, rows: int, seed: int) -> Batches:
    """Return the training batches, without an end."""
    return lm_batches.LMBatches(
      self.path,
      self._layout(self.validation, self.test, self.held_out),
      rows,
      seed=seed,
      split="train",
      weights=self.weights,
      shuffle=self.shuffle,
      cache_dir=self._cache_dir,
    )

  def eval_batches(self, rows: int, seed: int) -> Batches:
    """Return the batches of the held-out rows, or of `eval_path`."""
    if not self.eval_path:
      return self._held_out_batches(rows, seed, "validation")
    batches = lm_batches.LMBatches(
      self.eval_path,
      self._layout(0.0, 0.0, "documents"),
      rows,
      seed=seed,
      split="train",
      shuffle=self.shuffle,
      once=True,
      limit=self.eval_rows,
      cache_dir=self._cache_dir,
    )
    return self._with_rare(batches)

  def test_batches(self, rows: int, seed: int) -> Batches:
    """Return the batches of the test split; ValueError if there is none."""
    require(self.test > 0, "data.test", self.test, "above 0 for a test")
    return self._held_out_batches(rows, seed, "test")

  def _held_out_batches(self, rows: int, seed: int, split: str) -> Batches:
    """Return the batches of a held-out split, each row once."""
    batches = lm_batches.LMBatches(
      self.path,
      self._layout(self.validation, self.test, self.held_out),
      rows,
      seed=seed,
      split=split,
      weights=self.weights,
      shuffle=self.shuffle,
      once=True,
      limit=self.eval_rows,
      cache_dir=self._cache_dir,
    )
    return self._with_rare(batches)

  def _with_rare(self, data: Batches) -> Batches:
    """Add the array `rare` to batches if there is a `recall_limit`."""
    if self.recall_limit is None:
      return data
    return bigram_counts.RareBatches(data, self.path, self.recall_limit)

  def _layout(
    self, validation: float, test: float, held_out: HeldOut
  ) -> Layout:
    return Layout(self.length, self.packing, validation, test, held_out)

  @property
  def _cache_dir(self) -> Path:
    return CACHE_DIR if self.cache_dir is None else Path(self.cache_dir)


def _check_tokenizers(sources: Sequence[TokenSource]) -> None:
  """Raise DataError if two data sets were made by different tokenizers."""
  known = [x for x in sources if "tokenizer" in x.fingerprint]
  for source in known[1:]:
    first, other = (str(x.fingerprint["tokenizer"]) for x in (known[0], source))
    if first != other:
      raise DataError(
        f"{source.name}: its tokenizer's SHA-256 is {other[:16]}…: expected "
        f"{first[:16]}…, as {known[0].name} has it"
      )
