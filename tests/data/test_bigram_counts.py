"""Test counts of token pairs, their file, and rare AR targets."""

from collections import Counter
import io
import os
from pathlib import Path

from data_cases import documents, write_megatron, write_prepared
import numpy as np
import pytest
from text_cases import (
  DOCUMENTS,
  evaluated,
  finished as finished,
  folder as folder,
  make_config,
  make_options,
)
from train_cases import call as call, trainer as trainer

from train.data import recall
from train.data.text import bigram_counts
from train.data.text.rows import open_source
from train.data.text.token_source import DataError


def _slowly(texts) -> dict[tuple[int, int], int]:
  stream = [int(x) for text in texts for x in text]
  return dict(Counter(zip(stream, stream[1:], strict=False)))


def _as_dict(counts: bigram_counts.Counts) -> dict[tuple[int, int], int]:
  return {
    (int(pair) >> 32, int(pair) & 0xFFFFFFFF): int(n)
    for pair, n in zip(*counts, strict=True)
  }


@pytest.fixture(params=[7, 100, 1 << 22])
def block(request, monkeypatch) -> int:
  """Count few pairs at a time, so that blocks end inside documents."""
  monkeypatch.setattr(bigram_counts, "_BLOCK", request.param)
  monkeypatch.setattr(bigram_counts, "_MERGED", 3)
  return request.param


def test_counts_equal_a_slow_count(tmp_path, block) -> None:
  texts = [x % 9 for x in documents(40, most=30)]
  texts[3] = texts[3][:0]  # an empty one
  prepared = write_prepared(tmp_path / "set", (texts[:17], texts[17:]))
  megatron = write_megatron(tmp_path / "name", texts)
  for path in (prepared, megatron):
    found = _as_dict(bigram_counts.count(open_source(str(path))))
    assert found == _slowly(texts) and len(found) > 60


def test_pairs_across_rows_do_not_count(tmp_path, block, monkeypatch) -> None:
  texts = [np.arange(i, i + 5) % 7 for i in range(20)]
  path = write_prepared(tmp_path / "set", (texts[:9], texts[9:]))
  source = open_source(str(path))
  monkeypatch.setattr(type(source), "row_length", 4)
  found = _as_dict(bigram_counts.count(source))
  assert found == dict(sum((Counter(_slowly([x])) for x in texts), Counter()))


def test_the_file_holds_what_was_counted(tmp_path) -> None:
  texts = [x % 9 for x in documents(40, most=30)]
  path = str(write_prepared(tmp_path / "set", (texts,)))
  slow = _slowly(texts)
  assert bigram_counts.write(path) == (len(slow), len(slow))
  for limit in (0, 3, 10):
    wanted = {pair for pair, n in slow.items() if n > limit}
    found = bigram_counts.frequent([path], limit)
    assert set(_as_dict((found, found))) == wanted
  kept, total = bigram_counts.write(path, least=5)
  assert kept == sum(n >= 5 for n in slow.values()) < total == len(slow)
  assert len(bigram_counts.frequent([path], 4)) == kept
  with pytest.raises(
    DataError, match="fewer than 5 counts: expected at most 4"
  ):
    bigram_counts.frequent([path], 3)
  other = str(write_prepared(tmp_path / "other", (texts[:9],)))
  bigram_counts.write(other)
  with pytest.raises(DataError, match="expected at most 1; `rebased count"):
    bigram_counts.frequent([path, other], 10)
  bigram_counts.write(path)
  both = Counter(slow) + Counter(_slowly(texts[:9]))
  found = bigram_counts.frequent([path, other], 10)
  assert len(found) == sum(n > 10 for n in both.values())


def test_unusable_files_of_counts_are_named(tmp_path) -> None:
  texts = documents(9)
  path = write_prepared(tmp_path / "set", (texts,))
  with pytest.raises(DataError, match=f"`rebased count {path}` makes it"):
    bigram_counts.frequent([str(path)], 3)
  bigram_counts.write(str(path))
  table = bigram_counts.table_path(str(path))
  for name, how in (
    ("tokenizer", dict(tokenizer="another.json")),
    ("index", dict(vocab_size=300)),
  ):
    other = write_prepared(tmp_path / name, (texts,), **how)
    bigram_counts.table_path(str(other)).write_bytes(table.read_bytes())
    with pytest.raises(DataError, match=f"or tokenizer: .*{name} was"):
      bigram_counts.frequent([str(other)], 3)
  table.write_bytes(table.read_bytes()[:100])
  with pytest.raises(DataError, match="not a file of counts"):
    bigram_counts.frequent([str(path)], 3)
  with pytest.raises(ValueError, match="least=0: expected 1 or more"):
    bigram_counts.write(str(path), least=0)


def test_a_damaged_file_of_counts_is_named(tmp_path) -> None:
  """Bytes are flipped, cut, replaced; then an array has another form."""
  texts = documents(30)
  path = str(write_prepared(tmp_path / "set", (texts,)))
  bigram_counts.write(path)
  table, random = bigram_counts.table_path(path), np.random.default_rng(0)
  sound, right = table.read_bytes(), bigram_counts.frequent([path], 3)
  refused = 0
  for i in range(200):
    content, at = bytearray(sound), int(random.integers(len(sound)))
    if i % 3 == 0:
      content[at] ^= 1 << int(random.integers(8))
    elif i % 3 == 1:
      content = content[:at]
    else:
      content[at : at + 8] = random.bytes(8)
    table.write_bytes(content)
    try:
      found = bigram_counts.frequent([path], 3)
    except DataError as error:
      refused += str(table) in str(error)
    else:
      np.testing.assert_array_equal(found, right)
  assert refused > 150
  with np.load(io.BytesIO(sound)) as data:
    arrays = dict(data)
  for name, value in (
    ("record", np.array("[]")),
    ("record", np.array('{"version": 1, "least": true}')),
    ("counts", arrays["counts"][1:]),
    ("counts", arrays["counts"].astype(np.float32)),
    ("pair_deltas", arrays["pair_deltas"][None]),
  ):
    np.savez(table, **{**arrays, name: value})
    with pytest.raises(DataError, match="not a file of counts: .*another form"):
      bigram_counts.frequent([path], 3)
  table.unlink()
  os.mkfifo(table)
  with pytest.raises(DataError, match="it is a pipe: expected a regular file"):
    bigram_counts.frequent([path], 3)


def _shares(folder: Path, limit: int | None) -> dict[str, float]:
  return evaluated(make_config(folder, data=dict(recall_limit=limit)))


def test_only_rare_targets_are_ar(folder) -> None:
  bigram_counts.write(str(folder))
  slow, limit = _slowly(DOCUMENTS), 20
  data = make_config(folder).data.eval_batches(8, 0)
  ar = tokens = 0
  for index in range(data.num_batches):
    batch = data.read(index)
    seen_BT = np.asarray(recall.recalled(batch, "bigram"))
    pairs = zip(batch["tokens"].ravel(), batch["targets"].ravel(), strict=True)
    rare = [slow[int(a), int(b)] <= limit for a, b in pairs]
    rare_BT = np.reshape(rare, seen_BT.shape)
    ar += (batch["weights"] * seen_BT * rare_BT).sum()
    tokens += batch["weights"].sum()
  found, every = _shares(folder, limit), _shares(folder, None)
  np.testing.assert_allclose(found["ar_share"], ar / tokens)
  assert 0 < found["ar_share"] < every["ar_share"]
  np.testing.assert_allclose(found["loss"], every["loss"], rtol=1e-6)
  assert _shares(folder, 10**9)["ar_share"] == every["ar_share"]


def test_count_and_recall_limit_on_the_command_line(
  call, folder, finished
) -> None:
  config = make_config(folder)
  table = bigram_counts.table_path(str(folder))
  table.unlink(missing_ok=True)
  words = ("evaluate", str(finished), "--recall-limit", "20")
  code, _, err = call(*words)
  assert code == 2 and f"`rebased count {folder}` makes it" in err
  train = ("train", "lm-tiny", *make_options(config))
  code, _, err = call(*train, "--data.recall-limit", "20")
  assert code == 2 and "rebased count" in err
  assert list(Path.cwd().iterdir()) == []
  code, out, err = call("count", str(folder))
  assert code == 0 and table.exists() and "pairs" in out, err
  code, out, err = call(*words)
  assert code == 0 and "AR share" in out, err
  shares = [
    float(text.partition("AR share of targets")[2].split("│")[1])
    for text in (out, call("evaluate", str(finished))[1])
  ]
  assert 0 < shares[0] < shares[1]
  code, _, err = call(*words, "--recall", "unigram")
  assert code == 2 and "with data.recall='bigram'" in err
  code, _, err = call("count", "nowhere")
  assert code == 2 and "expected a prepared folder" in err
