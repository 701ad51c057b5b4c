"""Test errors of text batches, and changed fingerprints."""

import dataclasses
import json
from pathlib import Path

from data_cases import write_megatron, write_prepared
from lm_cases import LAYOUT, TEXTS, batches as batches, make, paths as paths
import numpy as np
import pytest

from train.data.batches import check_fingerprint
from train.data.text.lm_batches import LMBatches
from train.data.text.rows import Layout
from train.data.text.token_source import DataError

_CHANGES = {
  "seed": dict(seed=4),
  "rows": dict(rows=16),
  "length": dict(layout=Layout(17, validation=0.2)),
  "packing": dict(layout=Layout(16, "documents", validation=0.2)),
  "validation": dict(layout=Layout(16, validation=0.3)),
  "test": dict(layout=Layout(16, validation=0.2, test=0.1)),
  "held_out": dict(layout=Layout(16, validation=0.2, held_out="end")),
  "split": dict(split="validation"),
  "shuffle": dict(shuffle=False),
  "once": dict(once=True),
  "weights": dict(weights=(1.0,)),
  "limit": dict(limit=5),
}


@pytest.mark.parametrize("field", _CHANGES)
def test_the_fingerprint_names_a_changed_field(paths, field: str) -> None:
  batches = make(paths, "prepared")
  before = json.loads(json.dumps(batches.fingerprint))
  check_fingerprint(before, make(paths, "prepared").fingerprint)
  after = dataclasses.replace(batches, **_CHANGES[field]).fingerprint
  assert [x for x in before if before[x] != after[x]] == [field]


def test_the_fingerprint_names_changed_files(tmp_path: Path) -> None:
  cache = dict(cache_dir=tmp_path / "plans")
  make = lambda name: (
    LMBatches((str(tmp_path / name),), LAYOUT, 8, **cache).fingerprint
  )
  write_prepared(tmp_path / "a", (TEXTS,))
  write_prepared(tmp_path / "moved", (TEXTS,))
  write_prepared(tmp_path / "tokenizer", (TEXTS,), tokenizer="bpe")
  other = [np.where(x == 7, 8, x) for x in TEXTS]
  write_prepared(tmp_path / "tokens", (other,))
  write_prepared(tmp_path / "fewer", (TEXTS[:-1],))
  before = make("a")
  changed = lambda name: [x for x, y in before.items() if make(name)[x] != y]
  assert changed("moved") == []
  assert changed("tokenizer") == ["index", "tokenizer"]
  assert changed("tokens") == ["index", "blocks"]
  assert changed("fewer") == ["index", "lengths", "blocks"]


def test_wrong_data_sets_and_fields_are_named(paths, tmp_path: Path) -> None:
  with pytest.raises(ValueError, match="data.path=.*expected a prepared"):
    make(paths)[0]
  with pytest.raises(DataError, match="nothing: expected a prepared folder"):
    make(paths | {"no": "nothing"}, "no")[0]
  with pytest.raises(DataError, match="sequence 0 has .* length . 1 = 17"):
    make(paths, "megatron", packing="rows")[0]
  with pytest.raises(DataError, match="no validation row .* 9001 tokens"):
    layout = Layout(9000, validation=0.2)
    make(paths, "prepared", split="validation", layout=layout)[0]
  for field, value in {
    "rows": 0,
    "seed": -1,
    "split": "dev",
    "limit": 0,
    "weights": (1.0, 2.0),
  }.items():
    with pytest.raises(ValueError, match=f"{field}="):
      make(paths, "prepared", **{field: value})
  make(paths, "prepared", rows=1, seed=0, limit=1)  # the smallest ones
  for field, value in {
    "length": 0,
    "packing": "fit",
    "validation": 1.0,
    "test": 0.9,
  }.items():
    with pytest.raises(ValueError, match=f"{field}="):
      dataclasses.replace(LAYOUT, **{field: value})


@pytest.mark.parametrize("token", [-3, 257, 300])
def test_a_token_beyond_the_vocabulary_is_named(tmp_path, token) -> None:
  texts = [np.arange(20), np.arange(20)]
  texts[0][3] = 256  # the last token of the vocabulary
  texts[1][5] = token
  place = "document 1, token 5"
  if token < 0:
    path = write_megatron(tmp_path / "d", texts, code=4)
    value = "-3: expected 0 to 2147483647"
  else:
    path = write_prepared(tmp_path / "set", (texts,))
    value = f"{token}: expected 0 to 256"
  batches = LMBatches(
    (str(path),),
    Layout(13, validation=0.0),
    rows=3,
    shuffle=False,
    once=True,
    cache_dir=tmp_path / "plans",
  )
  with pytest.raises(DataError) as caught:
    batches[0]
  assert f"{path}: {place}: {value}" in str(caught.value)
