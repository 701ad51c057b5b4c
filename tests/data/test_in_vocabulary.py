"""Test that tokens outside a model's vocabulary are named with their place."""

import dataclasses
from pathlib import Path

from data_cases import write_megatron, write_prepared
import numpy as np
import pytest
from train_cases import tiny

from train.config import MQARStreamData
from train.data.batches import Batches
from train.data.in_vocabulary import InVocabulary
from train.data.prefetch import iterate
from train.data.text import megatron_source
from train.data.text.lm_batches import LMBatches
from train.data.text.megatron_source import MegatronSource
from train.data.text.prepared_source import PreparedSource
from train.data.text.rows import Layout
from train.data.text.token_source import DataError
from train.initial_state import try_data

V = 100


@dataclasses.dataclass(frozen=True)
class _Rows(Batches):
  """Three rows of tokens and targets below V, of which one can be replaced."""

  name: str
  value: int
  weight: float = 1.0
  rows: int = 3
  length: int = 4
  num_batches: int | None = None
  fingerprint = {}

  def read_rows(self, step, start, stop):
    weights = np.ones((3, 4), np.float32)
    weights[1, 2] = self.weight
    row = np.arange(12, dtype=np.int32).reshape(3, 4)
    batch = {"tokens": row, "targets": row + 1, "weights": weights}
    batch = {name: array.copy() for name, array in batch.items()}
    if step == 5:
      batch[self.name][1, 2] = self.value
    return {name: array[start:stop] for name, array in batch.items()}


@pytest.mark.parametrize("name", ["tokens", "targets"])
@pytest.mark.parametrize("value", [V, -1, 2**31 - 1])
def test_a_token_outside_the_vocabulary_is_named(name, value) -> None:
  batches = InVocabulary(_Rows(name, value), V)
  place = rf"step 5, row 1, {name}\[2\]: the token is {value}: expected 0 to 99"
  with pytest.raises(ValueError, match=place):
    batches[5]
  with pytest.raises(ValueError, match=place):
    batches.read(5, slice(1, 2))  # the process of this row
  assert batches.read(5, slice(2, 3))["tokens"][0, 0] == 8
  # The thread that reads ahead raises it instead of the batch.
  with iterate(batches, start=4, stop=7) as iterator:
    next(iterator)
    with pytest.raises(ValueError, match=place):
      next(iterator)


def test_the_edge_of_the_vocabulary_and_unused_targets_pass() -> None:
  for value in (0, V - 1):
    assert InVocabulary(_Rows("tokens", value), V)[5]["tokens"][1, 2] == value
  unused = InVocabulary(_Rows("targets", -100, weight=0.0), V)
  assert unused[5]["targets"][1, 2] == -100


@pytest.mark.parametrize("packing", ["stream", "documents"])
@pytest.mark.parametrize("kind", ["prepared", "megatron"])
@pytest.mark.parametrize("once", [False, True])
def test_the_document_and_token_are_named(
  tmp_path, packing, kind, once
) -> None:
  texts = [np.arange(n) for n in (9, 30, 12)]
  texts[1][17] = 200
  if kind == "prepared":
    path = write_prepared(tmp_path / "set", (texts[:1], texts[1:]))
  else:
    path = write_megatron(tmp_path / "d", texts, cuts=(41,))
  batches = LMBatches(
    (str(path),),
    Layout(8, packing, validation=0.0),
    rows=2,
    once=once,
    cache_dir=tmp_path / "plans",
  )
  place = f"{path}: document 1, token 17 .step [0-9]+, row [01].: the token is "
  with pytest.raises(ValueError, match=place + "200: expected 0 to 99"):
    for step in range(8):
      InVocabulary(batches, V).read(step)
  assert InVocabulary(batches, 201)[0]["tokens"].shape == (2, 8)


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_the_place_of_every_value_of_a_batch(tmp_path, packing) -> None:
  texts = [np.arange(n) + 50 * n for n in (9, 30, 0, 12, 1, 2, 21)]
  path = write_megatron(tmp_path / "d", texts)
  layout = Layout(8, packing, validation=0.0)
  cache = tmp_path / "plans"
  batches = LMBatches((str(path),), layout, 5, seed=2, cache_dir=cache)
  for step in range(4):
    batch = batches[step]
    for name in ("tokens", "targets"):
      for row, column in np.argwhere(batch["weights"]).tolist():
        words = batches.place(step, row, name, column).split(" ")
        document, token = int(words[2][:-1]), int(words[4])
        assert texts[document][token] == batch[name][row, column]


@pytest.mark.parametrize("unit", ["document", "sequence"])
@pytest.mark.parametrize("code", [4, 8])
def test_megatron_data_is_compared_before_training(
  tmp_path, monkeypatch, unit, code
) -> None:
  texts = [np.arange(n) % V for n in (9, 0, 700, 12)]
  texts[2][411] = V
  path = write_megatron(tmp_path / "d", texts, code=code, cuts=(20, 999))
  source = MegatronSource(path, unit)
  source.check_tokens(V + 1)
  expected = f"{path}: document 2, token 411 .in .*: the token is 100: expected"
  with pytest.raises(DataError, match=expected):
    source.check_tokens(V)
  # Of more data than this, parts are compared, with the first and the last.
  monkeypatch.setattr(megatron_source, "_CHECKED_BYTES", 32)
  monkeypatch.setattr(megatron_source, "_CHECKED_BLOCKS", 3)
  source.check_tokens(V)
  for place, value in ((0, 0), (3, 11)):
    last = [x.copy() for x in texts]
    last[place][value] = V + 7
    path = write_megatron(tmp_path / f"e{place}", last, code=code)
    with pytest.raises(DataError, match=f"document {place}, token {value} "):
      MegatronSource(path, unit).check_tokens(V)


def test_negative_tokens_are_found_before_training(tmp_path: Path) -> None:
  path = write_megatron(tmp_path / "d", [np.array([1, 2, -5])], code=4)
  with pytest.raises(
    DataError, match="document 0, token 2 .*: the token is -5"
  ):
    MegatronSource(path).check_tokens(2**31)


def test_uint16_tokens_need_no_look(tmp_path: Path, monkeypatch) -> None:
  path = write_megatron(tmp_path / "d", [np.array([1, 65_535])])
  monkeypatch.setattr(MegatronSource, "_bytes", None)  # nothing is read
  MegatronSource(path).check_tokens(65_536)
  monkeypatch.undo()
  with pytest.raises(DataError, match="token 1 .*: the token is 65535"):
    MegatronSource(path).check_tokens(65_535)


def test_a_larger_vocabulary_of_prepared_data_is_named(tmp_path: Path) -> None:
  path = write_prepared(tmp_path / "set", ([np.arange(5)],))
  PreparedSource(path).check_tokens(257)
  with pytest.raises(DataError, match="has 257 tokens: expected at most 256"):
    PreparedSource(path).check_tokens(256)


def test_held_out_rows_without_a_target_are_refused() -> None:
  """A mean over no target would be a division by zero, after training."""

  @dataclasses.dataclass(frozen=True)
  class Data(MQARStreamData):
    real: int = 0  # batches before the first one that has a target

    def eval_batches(self, rows: int, seed: int) -> Batches:
      batches = super().eval_batches(rows, seed)
      return _Weighted(batches, self.real)

  @dataclasses.dataclass(frozen=True)
  class _Weighted(InVocabulary):
    def read_rows(self, step, start, stop):
      batch = self.inner.read(step, slice(start, stop))
      batch["weights"][:] = step == self.vocab_size
      return batch

  config = tiny()
  data = Data(**dataclasses.asdict(config.data), real=99)
  with pytest.raises(ValueError, match="every weight of its 3 batches is 0"):
    try_data(dataclasses.replace(config, data=data))
  data = dataclasses.replace(data, real=2)
  try_data(dataclasses.replace(config, data=data))


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_the_first_batches_are_compared_before_a_run(kind, monkeypatch) -> None:
  """Any data source: its config need not know its tokens."""
  name = f"{kind}_batches"
  make = getattr(MQARStreamData, name)

  class Spoiled(InVocabulary):
    def read_rows(self, step, start, stop):
      batch = self.inner.read(step, slice(start, stop))
      batch["tokens"][-1, 3] = 32
      return batch

  monkeypatch.setattr(
    MQARStreamData, name, lambda *args: Spoiled(make(*args), 0)
  )
  place = r"step 0, row [0-9]+, tokens\[3\]: the token is 32: expected 0 to 31"
  with pytest.raises(DataError, match=place):
    try_data(tiny())
