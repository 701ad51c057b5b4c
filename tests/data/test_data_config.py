"""Test the interface of a data source that a user writes."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from train.data.batches import Batch, Batches, Fingerprint, check_storable
from train.data.config import DataConfig, Field, MQARStreamData, check_batch
from train.data.prefetch import iterate


@dataclasses.dataclass(frozen=True)
class Counting(Batches):
  """Rows of consecutive numbers, as in the docstring of `Batches`."""

  rows: int
  length: int = 16
  limit: int | None = None
  lost: int = 0  # rows that `read_rows` forgets

  @property
  def num_batches(self) -> int | None:
    return self.limit

  @property
  def fingerprint(self) -> Fingerprint:
    return {"data": "counting", "version": 1, "rows": self.rows}

  def read_rows(self, step: int, start: int, stop: int) -> Batch:
    stop -= self.lost
    first_B = step * self.rows + np.arange(start, stop, dtype=np.int32)
    row_BW = (first_B[:, None] + np.arange(17, dtype=np.int32)) % 100
    return {
      "tokens": row_BW[:, :-1],
      "targets": row_BW[:, 1:],
      "weights": np.ones((stop - start, 16), np.float32),
    }


@dataclasses.dataclass(frozen=True)
class CountingData(DataConfig):
  """The fewest methods that a data source needs."""

  length: int = 16
  vocab_size: int = 100
  workers: int = 0

  def train_batches(self, rows: int, seed: int) -> Batches:
    return Counting(rows)

  def eval_batches(self, rows: int, seed: int) -> Batches:
    return Counting(rows, limit=2)


def test_two_methods_are_enough() -> None:
  data = CountingData()
  assert data.targets == data.length and data.read_vocab_size() == 100
  fields = data.fields(8)
  assert fields == {
    "tokens": Field((8, 16), "int32"),
    "targets": Field((8, 16), "int32"),
    "weights": Field((8, 16), "float32"),
  }
  assert data.eval_fields(8) == fields
  batches = data.train_batches(8, 0)
  check_batch(batches[3], fields, "train_batches")
  with iterate(batches, start=3, stop=5, rows=slice(4, 8)) as iterator:
    for step in (3, 4):
      np.testing.assert_equal(
        next(iterator)["tokens"], batches[step]["tokens"][4:]
      )
  with pytest.raises(ValueError, match="CountingData has no test split"):
    data.test_batches(8, 0)


@pytest.mark.parametrize(
  "field, value",
  [("length", 0), ("vocab_size", -1), ("workers", -1), ("workers", 1.5)],
)
def test_the_base_class_checks_what_all_have(field, value) -> None:
  with pytest.raises(ValueError, match=f"data.{field}={value}: expected"):
    CountingData(**{field: value})


def test_a_missing_row_is_named() -> None:
  expected = r"Counting.read_rows: tokens has shape \(7, 16\): expected 8 rows"
  with pytest.raises(ValueError, match=expected):
    Counting(8, lost=1).read(0)


def test_a_batch_that_is_not_as_announced_is_named() -> None:
  fields = CountingData().fields(8)
  batch = Counting(8)[0]
  with pytest.raises(ValueError, match="here: a batch has the arrays"):
    check_batch({"tokens": batch["tokens"]}, fields, "here")
  wide = batch | {"targets": batch["targets"].astype(np.int64)}
  expected = r"here: targets is int64\[8, 16\]: expected int32\[8, 16\]"
  with pytest.raises(ValueError, match=expected):
    check_batch(wide, fields, "here")


@pytest.mark.parametrize(
  ("name", "dtype", "expected"),
  [("tokens", "int64", "int32"), ("weights", "float64", "float32")],
)
def test_a_dtype_that_training_does_not_read_is_refused(
  name: str, dtype: str, expected: str
) -> None:
  """Also where `fields` says the same, as it does by default."""
  batch = Counting(8)[0]
  batch[name] = batch[name].astype(dtype)
  fields = {k: Field(x.shape, str(x.dtype)) for k, x in batch.items()}
  message = rf"train_batches: {name} is {dtype}\[8, 16\]: expected {expected}"
  with pytest.raises(ValueError, match=message):
    check_batch(batch, fields, "train_batches")


class _Weird(Counting):
  value: Any = None

  @property
  def fingerprint(self) -> Fingerprint:
    return {"data": "weird", "f": self.value}


@pytest.mark.parametrize(
  ("value", "kind"),
  [(np.arange(3), "ndarray"), ((1, 2), "tuple"), (float("nan"), "float")],
)
def test_a_fingerprint_that_cannot_be_stored_is_refused(value, kind) -> None:
  check_storable(Counting(8))
  weird = type("Weird", (_Weird,), {"value": value})(8)
  message = rf"Weird.fingerprint\['f'\] is a value of type {kind}: expected"
  with pytest.raises(ValueError, match=message):
    check_storable(weird)


def test_fields_announce_the_arrays_of_the_batches() -> None:
  data = MQARStreamData()
  check_batch(data.train_batches(8, 0)[0], data.fields(8), "train")
  check_batch(data.eval_batches(8, 0)[0], data.eval_fields(8), "eval")
