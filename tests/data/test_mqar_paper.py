"""Test the MQAR data set of the paper, and its cache."""

import dataclasses
import hashlib
import logging
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from train.data import mqar_paper
from train.data.mqar import MQARConfig, mqar_rows
from train.data.mqar_paper import (
  MQARPaper,
  epoch_order,
  load_paper_examples,
  paper_examples,
  paper_test_batches,
)

SMALL = MQARConfig(vocab_size=256, length=32, pairs=4)

GOLDEN = {
  (128, 16, 42): ("01816dd2ffa0e967", "49dcf293951a5aa0"),
  (128, 16, 52): ("fc97de41383b6b8c", "952c807f705da026"),
  (256, 32, 42): ("ae05757196f512e0", "71186e7da57b5e0e"),
  (256, 64, 42): ("70af8d4bda4fe7dc", "087dcb728b769cb4"),
  (128, 32, 42): ("ebf4a437a0fb2c31", "2ad27f57ffb3ed69"),
  (2048, 32, 42): ("5e7f5acc89fa1895", "91948e578281d9d3"),
  (2048, 32, 52): ("b3a038655acb8fd9", "65a6eaa82366e113"),
}


def _same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def _labels(batch, length):
  """Return targets at every position, -100 for none: int64 (B, T)."""
  labels_BT = np.full((len(batch["tokens"]), length), -100, np.int64)
  index_BM = batch["positions"].astype(np.int64)
  np.put_along_axis(labels_BT, index_BM, batch["targets"].astype(np.int64), 1)
  return labels_BT


def _sha(array):
  content = np.ascontiguousarray(array.astype(np.int64)).tobytes()
  return hashlib.sha256(content).hexdigest()[:16]


def _hashes(config, parts):
  batch = mqar_rows(config, *parts)
  return _sha(batch["tokens"]), _sha(_labels(batch, config.length))


def test_paper_example_rows():
  config = MQARConfig(vocab_size=32, length=16, pairs=2)
  batch = mqar_rows(config, *paper_examples(config, 2, 42))
  assert batch["tokens"].tolist() == [
    [10, 17, 12, 29, 10, 0, 12] + 9 * [0],
    [11, 28, 13, 26, 11] + 7 * [0] + [13, 0, 0, 0],
  ]
  assert batch["positions"].tolist() == [[4, 6], [4, 12]]
  assert batch["targets"].tolist() == [[17, 29], [28, 26]]


@pytest.mark.parametrize(("length", "pairs", "seed"), GOLDEN)
def test_paper_golden_hashes(length, pairs, seed):
  config = MQARConfig(8192, length, pairs)
  parts = paper_examples(config, 64, seed)
  assert _hashes(config, parts) == GOLDEN[length, pairs, seed]


@pytest.mark.slow
def test_paper_golden_hashes_of_the_whole_data_set():
  config = MQARConfig()
  test = paper_examples(config, 3_000, 52)
  assert _hashes(config, test) == ("4f11da0817779414", "dc5c7288e58c6eb4")
  train = paper_examples(config, 100_000, 42)
  assert _hashes(config, train) == ("b4b2b53255699ff1", "cd857d05a9dfd3e2")
  first = mqar_rows(config, *train[:, :1])["tokens"][0, :8]
  assert first.tolist() == [1299, 6184, 2712, 7073, 3544, 5989, 3358, 5857]


def _refuse(*_):
  raise AssertionError("the cache was not used")


def test_the_cache_is_used_and_gives_the_same(tmp_path, monkeypatch):
  expected = paper_examples(SMALL, 20, 42)
  first = load_paper_examples(SMALL, 20, 42, tmp_path)
  monkeypatch.setattr(mqar_paper, "paper_examples", _refuse)
  again = load_paper_examples(SMALL, 20, 42, tmp_path)
  np.testing.assert_array_equal(first, expected)
  np.testing.assert_array_equal(again, expected)
  assert len(list(tmp_path.iterdir())) == 1
  with pytest.raises(AssertionError, match="not used"):
    load_paper_examples(SMALL, 20, 43, tmp_path)


def _flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def _other_contents(path):
  other = path.parent / "other"
  load_paper_examples(SMALL, 20, 43, other)
  os.replace(next(other.iterdir()), path)


@pytest.mark.parametrize(
  "damage",
  [
    _flip,
    _other_contents,
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[:-7]),
    lambda path: path.write_bytes(path.read_bytes() + b"x"),
    lambda path: path.write_bytes(b"not an array" * 100),
  ],
  ids=["flipped", "other", "empty", "truncated", "longer", "garbage"],
)
def test_a_damaged_cache_file_is_made_again(tmp_path, caplog, damage):
  expected = np.array(load_paper_examples(SMALL, 20, 42, tmp_path))
  (path,) = tmp_path.iterdir()
  good = path.read_bytes()
  damage(path)
  assert path.read_bytes() != good
  with caplog.at_level(logging.WARNING):
    parts = load_paper_examples(SMALL, 20, 42, tmp_path)
  assert "damaged" in caplog.text
  np.testing.assert_array_equal(parts, expected)
  assert path.read_bytes() == good


def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch):
  def fail(*_):
    raise OSError("disk full")

  monkeypatch.setattr(mqar_paper, "sync", fail)
  with pytest.raises(OSError, match="disk full"):
    load_paper_examples(SMALL, 20, 42, tmp_path)
  assert list(tmp_path.iterdir()) == []


def test_two_processes_may_fill_the_cache_at_once(tmp_path):
  code = (
    "import sys; from train.data.mqar import MQARConfig\n"
    "from train.data.mqar_paper import load_paper_examples\n"
    "config = MQARConfig(256, 32, 4)\n"
    "parts = load_paper_examples(config, 3000, 42, sys.argv[1])\n"
    "print(int(parts.sum()))"
  )
  environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
  command = [sys.executable, "-c", code, str(tmp_path)]
  workers = [
    subprocess.Popen(
      command, env=environment, stdout=subprocess.PIPE, text=True
    )
    for _ in range(2)
  ]
  sums = [worker.communicate(timeout=120)[0].strip() for worker in workers]
  assert sums == 2 * [str(paper_examples(SMALL, 3000, 42).sum())]
  assert len(list(tmp_path.iterdir())) == 1


def test_one_process_makes_the_examples(tmp_path, monkeypatch):
  """Each thread opens the lock itself, as a process does."""
  made, start = [], threading.Barrier(3)

  def make(*args):
    made.append(args)
    time.sleep(0.2)
    return paper_examples(*args)

  def work():
    start.wait()
    load_paper_examples(SMALL, 20, 3, tmp_path)

  monkeypatch.setattr(mqar_paper, "paper_examples", make)
  threads = [threading.Thread(target=work) for _ in range(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert made == [(SMALL, 20, 3)]


@pytest.fixture
def paper(tmp_path):
  return MQARPaper(
    SMALL, seed=3, rows=8, epochs=3, examples=20, cache_dir=tmp_path
  )


def test_an_epoch_holds_every_example_once(paper):
  assert (paper.steps_per_epoch, paper.num_batches) == (3, 9)
  whole = mqar_rows(SMALL, *paper_examples(SMALL, 20, 42))["tokens"]
  orders = []
  for epoch in range(3):
    batches = [paper[3 * epoch + i] for i in range(3)]
    for batch in batches:
      assert [len(x) for x in batch.values()] == [8, 8, 8, 8]
    real = [x["tokens"][x["weights"][:, 0] == 1] for x in batches]
    assert [len(x) for x in real] == [8, 8, 4]
    rows = [tuple(row) for x in real for row in x.tolist()]
    assert sorted(rows) == sorted(tuple(row) for row in whole.tolist())
    orders.append(rows)
  assert orders[0] != orders[1] != orders[2] != orders[0]
  assert sum(paper[2]["weights"].sum(axis=1)) == 4 * SMALL.pairs


def test_drop_last_leaves_out_the_incomplete_batch(paper):
  dropping = dataclasses.replace(paper, drop_last=True)
  assert (dropping.steps_per_epoch, dropping.num_batches) == (2, 6)
  _same(dropping[1], paper[1])
  _same(dropping[2], paper[3])
  assert all(dropping[i]["weights"].all() for i in range(6))
  with pytest.raises(ValueError, match="rows=21: expected at most examples=20"):
    dataclasses.replace(dropping, rows=21)


def test_paper_sizes():
  config = MQARConfig()
  assert MQARPaper(config).steps_per_epoch == 196
  assert MQARPaper(config).num_batches == 12_544
  assert MQARPaper(config, drop_last=True).num_batches == 12_480


def test_epoch_order_is_a_shuffle_of_seed_and_epoch():
  order = epoch_order(7, 2, 1000)
  assert sorted(order.tolist()) == list(range(1000))
  assert np.array_equal(order, epoch_order(7, 2, 1000))
  for other in (epoch_order(8, 2, 1000), epoch_order(7, 3, 1000)):
    assert np.mean(order == other) < 0.02
  assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1


def test_paper_test_batches(tmp_path):
  batches = paper_test_batches(SMALL, rows=512, cache_dir=tmp_path)
  assert batches.num_batches == 6
  found = list(batches)
  weights = np.concatenate([batch["weights"] for batch in found])
  assert weights.sum() == 3000 * SMALL.pairs
  assert np.all(weights[:3000] == 1)
  tokens = np.concatenate([batch["tokens"] for batch in found])[:3000]
  parts = paper_examples(SMALL, 3000, 52)
  np.testing.assert_array_equal(tokens, mqar_rows(SMALL, *parts)["tokens"])


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("rows", 0),
    ("epochs", 0),
    ("examples", 0),
    ("seed", -1),
    ("data_seed", -1),
  ],
)
def test_wrong_paper_fields_are_named(field, value):
  with pytest.raises(ValueError, match=f"{field}={value}"):
    dataclasses.replace(MQARPaper(SMALL), **{field: value})


def test_the_fingerprint_does_not_depend_on_the_epochs(paper):
  longer = dataclasses.replace(paper, epochs=9)
  assert longer.fingerprint == paper.fingerprint
  _same(longer[8], paper[8])
