"""Test `prepare --row-length`: rows cut from the stream of each shard."""

import json
import re

from data_cases import EOS
import numpy as np
from prepare_cases import DOMAINS, records, run, shard_texts, write_formats
import pytest
from train_cases import call as call

from train.data.prepare.shard import RowCutter
from train.data.text.lm_batches import LMBatches
from train.data.text.packing import stream_plan
from train.data.text.prepared_source import PreparedSource
from train.data.text.rows import Layout
from train.data.text.token_source import DataError


@pytest.mark.parametrize("length", [1, 2, 7, 40, 5000])
def test_rows_are_those_of_a_stream_plan(length: int) -> None:
  random = np.random.default_rng(length)
  sizes = random.integers(0, 60, 50)
  documents = [random.integers(0, 99, n).astype("<u2") for n in sizes]
  cutter = RowCutter(length)
  rows = [row.tolist() for x in documents for row in cutter.cut(x)]
  stream = np.concatenate(documents)
  plan = stream_plan(length + 1, sizes, np.arange(50))
  assert cutter.rows == len(rows) == len(plan)
  assert rows == [
    stream[r * length : r * length + length + 1].tolist()
    for r in range(len(plan))
  ]
  used = len(plan) * length + 1 if len(plan) else 0
  assert cutter.left_over == len(stream) - used
  assert RowCutter(3).left_over == 0


def test_prepare_makes_a_data_set_of_rows(tmp_path) -> None:
  data = write_formats(tmp_path / "in")
  out = tmp_path / "rows"
  whole = run([tmp_path / "in"], tmp_path / "whole")
  found = run([tmp_path / "in"], out, row_length=16)
  assert (found["kind"], found["length"]) == ("rows", 16)
  for field in ("documents", "tokens", "text_bytes", "domain_names"):
    assert found[field] == whole[field]
  assert not list(out.glob("*.domains.npy"))
  source, first = PreparedSource(out), 0
  for shard, texts in zip(
    found["shards"], shard_texts(tmp_path / "whole"), strict=True
  ):
    stream = np.concatenate([[*x.encode(), EOS] for x in texts])
    assert shard["rows"] == (len(stream) - 1) // 16 > 1
    assert shard["left_over"] == len(stream) - 16 * shard["rows"] - 1
    for r in range(shard["rows"]):
      np.testing.assert_array_equal(
        source[first + r], stream[16 * r : 16 * r + 17]
      )
    first += shard["rows"]
    assert sum(x["tokens"] for x in shard["domains"].values()) == len(stream)
    own = [x["meta"]["pile_set_name"] for x in data[shard["input"]["name"]]]
    counts = {k: x["documents"] for k, x in shard["domains"].items()}
    assert counts == {name: own.count(name) for name in DOMAINS}
  assert len(source) == first == found["rows"]


def test_rows_are_read_as_rows(tmp_path) -> None:
  write_formats(tmp_path / "in")
  out = tmp_path / "rows"
  found = run([tmp_path / "in"], out, row_length=16)

  def make(length: int, packing: str) -> LMBatches:
    layout = Layout(length, packing, validation=0.1)
    cache = tmp_path / "plans"
    return LMBatches((str(out),), layout, 8, shuffle=False, cache_dir=cache)

  batches, source = make(16, "rows"), PreparedSource(out)
  for step in range(2):
    for row in range(8):
      tokens = source[8 * step + row]
      batch = batches[step]
      np.testing.assert_array_equal(batch["tokens"][row], tokens[:-1])
      np.testing.assert_array_equal(batch["targets"][row], tokens[1:])
  held_out = found["rows"] // 10
  assert len(batches.parts[0].plan) == found["rows"] - held_out
  for length, packing in ((16, "stream"), (16, "documents"), (15, "rows")):
    with pytest.raises(DataError, match="rows of 16 . 1 tokens: .*length=16"):
      make(length, packing).read(0)


def test_a_data_set_of_rows_needs_packing_rows(tmp_path) -> None:
  write_formats(tmp_path / "in")
  with pytest.raises(ValueError, match="row_length=0: expected an integer ≥ 1"):
    run([tmp_path / "in"], tmp_path / "out", row_length=0)
  with pytest.raises(Exception, match=r"no row of row_length . 1 = 10,?001"):
    run([tmp_path / "in"], tmp_path / "none", row_length=10_000)
  out = tmp_path / "out"
  run([tmp_path / "in"], out, row_length=16)
  with pytest.raises(ValueError, match="rows.length was 16, is 8"):
    run([tmp_path / "in"], out, row_length=8)
  file = out / "dataset.json"
  sidecar = json.loads(file.read_text())
  for changes, expected in (
    (dict(length=0), "length=0: expected 1 or more"),
    (dict(length=15), "tokens: expected .* as dataset.json says"),
    (dict(rows=3), "rows=3: expected"),
  ):
    file.write_text(json.dumps({**sidecar, **changes}))
    with pytest.raises(DataError, match=expected):
      PreparedSource(out)


def test_inspect_shows_rows_domains_and_boundaries(call, tmp_path) -> None:
  write_formats(tmp_path / "in")
  out = tmp_path / "rows"
  found = run([tmp_path / "in"], out, row_length=64)
  code, shown, err = call("inspect", "data", str(out))
  assert code == 0, err
  assert re.search(rf"│ rows +│ +{found['rows']} of 64 \+ 1 tokens │", shown)
  after = "tokens after the last rows"
  assert re.search(rf"│ {after} +│ +{found['left_over']} │", shown)
  for name in DOMAINS:
    parts = [x["domains"][name] for x in found["shards"]]
    documents, tokens = (
      f"{sum(x[y] for x in parts):,}" for y in ("documents", "tokens")
    )
    row = rf"│ {re.escape(name)} +│ +{documents} │ +{tokens} │"
    assert re.search(row, shown), name
  middle = found["rows"] // 2
  assert f"sample: 65 tokens, row {middle};" in shown
  sample = shown.rpartition("boundary between documents\n")[2].strip("\n")
  tokens = PreparedSource(out)[middle]
  text = bytes(x if x != EOS else ord("|") for x in tokens.tolist()).decode(
    errors="replace"
  )
  assert "|" in text and len(records(1)) == 1
  assert sample.rstrip() == text.replace("|", "▌").rstrip("▌ \n")
