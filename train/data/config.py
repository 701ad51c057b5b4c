"""Where the batches of a run come from: the data part of its config."""

import abc
from collections.abc import Sequence
import dataclasses
from pathlib import Path
from typing import ClassVar, NamedTuple

from train.data import batches, mqar, mqar_paper
from train.data.recall import RECALLS, Recall
from train.data.text import bigram_counts as bigrams, lm_batches
from train.data.text.packing_cache import CACHE_DIR
from train.data.text.rows import HeldOut, Layout, Packing, open_source
from train.data.text.token_source import DataError, TokenSource


class Field(NamedTuple):
  """One array of a batch."""

  shape: tuple[int, int]
  dtype: str


class DataConfig(abc.ABC):
  """Abstract: where a run's batches come from."""

  length: int  # tokens of a row
  vocab_size: int | None  # None where only the files know it
  workers: int = 0  # processes that read ahead
  timeout: float | None = 600.0  # seconds for a batch; None: any time
  recall: Recall | None = None  # the targets that evaluation tells apart
  perplexity: ClassVar[bool] = False  # whether it says more than accuracy

  @property
  def targets(self) -> int:
    """Targets of a row."""
    return self.length

  @abc.abstractmethod
  def train_batches(self, rows: int, seed: int) -> batches.Batches:
    """The training batches, of `rows` rows each."""

  @abc.abstractmethod
  def eval_batches(self, rows: int, seed: int) -> batches.Batches:
    """The held-out batches, finitely many, of `rows` rows each."""

  @abc.abstractmethod
  def fields(self, rows: int) -> dict[str, Field]:
    """The arrays of a training batch of `rows` rows; reads no file."""

  def eval_fields(self, rows: int) -> dict[str, Field]:
    """The arrays of a batch of the other splits."""
    return self.fields(rows)

  def test_batches(self, rows: int, seed: int) -> batches.Batches:
    """The batches of the test split; ValueError where there is none."""
    raise ValueError(
      f"{type(self).__name__} has no test split beside its held-out rows"
    )

  def read_vocab_size(self) -> int | None:
    """The vocabulary, from the files where they know it."""
    return self.vocab_size


@dataclasses.dataclass(frozen=True)
class MQARData(DataConfig):
  """Abstract: rows of multi-query associative recall, of one shape."""

  vocab_size: int = 8192
  length: int = 128
  pairs: int = 16
  power: float = 0.01

  def __post_init__(self):
    self.rows()  # raises where there is no such row

  @property
  def targets(self) -> int:
    return self.pairs

  def rows(self) -> mqar.MQARConfig:
    return mqar.MQARConfig(self.vocab_size, self.length, self.pairs, self.power)

  def fields(self, rows: int) -> dict[str, Field]:
    predicted = (rows, self.pairs)
    return dict(
      tokens=Field((rows, self.length), "int32"),
      positions=Field(predicted, "int32"),
      targets=Field(predicted, "int32"),
      weights=Field(predicted, "float32"),
    )


@dataclasses.dataclass(frozen=True)
class MQARStreamData(MQARData):
  """Unlimited MQAR: example i is a function of (seed, i)."""

  vocab_size: int = 256
  length: int = 32
  pairs: int = 4
  test_examples: int = 2048

  def __post_init__(self):
    super().__post_init__()
    batches.require(
      self.test_examples >= 1, "data.test_examples", self.test_examples, "≥ 1"
    )

  def train_batches(self, rows: int, seed: int) -> batches.Batches:
    return mqar.MQARStream(self.rows(), seed, rows)

  def eval_batches(self, rows: int, seed: int) -> batches.Batches:
    return mqar.stream_test_batches(
      self.rows(), seed=seed, examples=self.test_examples, rows=rows
    )


@dataclasses.dataclass(frozen=True)
class MQARPaperData(MQARData):
  """The paper's 100,000 training and 3,000 test rows, one set for all seeds."""

  examples: int = 100_000
  epochs: int = 64
  drop_last: bool = False  # an epoch's incomplete last batch; paper: T ≥ 512

  def train_batches(self, rows: int, seed: int) -> batches.Batches:
    return mqar_paper.MQARPaper(
      self.rows(),
      seed=seed,
      rows=rows,
      epochs=self.epochs,
      drop_last=self.drop_last,
      examples=self.examples,
    )

  def eval_batches(self, rows: int, seed: int) -> batches.Batches:
    return mqar_paper.paper_test_batches(self.rows(), rows=rows)


@dataclasses.dataclass(frozen=True)
class TextData(DataConfig):
  """Text as tokens: data sets that `rebased prepare` made, or Megatron's.

  A held-out row is one of documents that are in no training row, or, with
  `held_out="end"`, one of the last of the stream. `packing` is "stream", rows
  cut from the documents one behind the other; "documents", whole documents with
  a reset at each border; or "rows", sequences of `length` + 1 tokens as they
  are, of which the last are held out.
  """

  path: tuple[str, ...] = ()  # prepared folders, or Megatron indices NAME.idx
  weights: tuple[float, ...] = ()  # of the paths in the mixture; none: by rows
  length: int = 256  # a row's inputs
  packing: Packing = "stream"
  validation: float = 0.01  # fraction that is held out
  test: float = 0.0  # fraction that is held out for `evaluate --test`
  held_out: HeldOut = "documents"  # or the end of the text, for a few documents
  eval_path: tuple[str, ...] = ()  # held-out text of its own, in place of it
  eval_rows: int | None = 1024  # the most held-out rows; None: all
  shuffle: bool = True  # False: in the order of the files
  workers: int = 0  # processes that read ahead; 0: a thread
  cache_dir: str | None = None  # of plans; default ~/.cache/rebased_jax/plans
  timeout: float | None = 600.0  # seconds for a batch; None: any time
  recall: Recall | None = "bigram"  # what makes a target AR, see recall.py
  recall_limit: int | None = None  # an AR bigram's most counts in training

  perplexity: ClassVar[bool] = True

  def __post_init__(self):
    for field in ("path", "eval_path", "weights"):
      value = getattr(self, field)
      is_tuple = isinstance(value, tuple)
      batches.require(is_tuple, f"data.{field}", value, "a tuple")
    self.train_batches(1, 0)  # raises where there are no such rows
    batches.require(
      isinstance(self.workers, int) and self.workers >= 0,
      "data.workers",
      self.workers,
      "0 or more",
    )
    batches.require(
      self.eval_rows is None or self.eval_rows >= 1,
      "data.eval_rows",
      self.eval_rows,
      "1 or more, or None",
    )
    batches.require(
      self.timeout is None or self.timeout > 0,
      "data.timeout",
      self.timeout,
      "None or a number of seconds above 0",
    )
    batches.require(
      self.recall in (None, *RECALLS), "data.recall", self.recall, str(RECALLS)
    )
    limit, expected = self.recall_limit, "None, or 0 or more"
    whole = limit is None or (isinstance(limit, int) and limit >= 0)
    batches.require(whole, "data.recall_limit", limit, expected)
    expected += " with data.recall='bigram'"
    bigrams = limit is None or self.recall == "bigram"
    batches.require(bigrams, "data.recall_limit", limit, expected)
    if self.eval_path:
      expected = f"0 with data.eval_path={self.eval_path!r}"
      none = self.validation == 0
      batches.require(none, "data.validation", self.validation, expected)
    else:
      expected = "above 0, or a data.eval_path"
      some = self.validation > 0
      batches.require(some, "data.validation", self.validation, expected)

  @property
  def vocab_size(self) -> None:
    return None

  def _layout(self, held_out: bool) -> Layout:
    fractions = (self.validation, self.test) if held_out else (0.0, 0.0)
    place = self.held_out if held_out else "documents"
    return Layout(self.length, self.packing, *fractions, place)

  def _batches(
    self, rows: int, seed: int, split: str, *, own: bool = False
  ) -> lm_batches.LMBatches:
    """The batches of a split, or of all text under `eval_path`."""
    held_out = own or split != "train"
    return lm_batches.LMBatches(
      self.eval_path if own else self.path,
      self._layout(held_out=not own),
      rows,
      seed=seed,
      split=split,
      weights=() if own else self.weights,
      shuffle=self.shuffle,
      once=held_out,
      limit=self.eval_rows if held_out else None,
      cache_dir=CACHE_DIR if self.cache_dir is None else Path(self.cache_dir),
    )

  def fields(self, rows: int) -> dict[str, Field]:
    shape = (rows, self.length)
    names = ("tokens", "targets") + ("segment_ids",) * (
      self.packing == "documents"
    )
    integers = {name: Field(shape, "int32") for name in names}
    return {**integers, "weights": Field(shape, "float32")}

  def eval_fields(self, rows: int) -> dict[str, Field]:
    fields = self.fields(rows)
    if self.recall_limit is not None:
      fields["rare"] = fields["weights"]
    return fields

  def train_batches(self, rows: int, seed: int) -> batches.Batches:
    return self._batches(rows, seed, "train")

  def _with_rare(self, data: lm_batches.LMBatches) -> batches.Batches:
    if self.recall_limit is None:
      return data
    return bigrams.RareBatches(data, self.path, self.recall_limit)

  def eval_batches(self, rows: int, seed: int) -> batches.Batches:
    if self.eval_path:
      return self._with_rare(self._batches(rows, seed, "train", own=True))
    return self._with_rare(self._batches(rows, seed, "validation"))

  def test_batches(self, rows: int, seed: int) -> batches.Batches:
    batches.require(self.test > 0, "data.test", self.test, "above 0 for a test")
    return self._with_rare(self._batches(rows, seed, "test"))

  def read_vocab_size(self) -> int | None:
    paths = (*self.path, *self.eval_path)
    sources = [open_source(path, self.packing) for path in paths]
    _check_tokenizers(sources)
    sizes = [source.vocab_size for source in sources]
    return max((size for size in sizes if size is not None), default=None)


def _check_tokenizers(sources: Sequence[TokenSource]) -> None:
  """Raises DataError where two data sets were made by two tokenizers."""
  known = [x for x in sources if "tokenizer" in x.fingerprint]
  for source in known[1:]:
    first, other = (x.fingerprint["tokenizer"] for x in (known[0], source))
    if first != other:
      raise DataError(
        f"{source.name}: its tokenizer's SHA-256 is {other[:16]}…: expected "
        f"{first[:16]}…, as {known[0].name} has it"
      )
