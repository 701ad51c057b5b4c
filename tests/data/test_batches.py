"""Test batches and reading ahead: steps, rows, hosts and errors."""

import dataclasses
import json
import threading

import numpy as np
import pytest

from train.data.batches import Batches, check_fingerprint
from train.data.mqar import MQARConfig, MQARStream, stream_test_batches
from train.data.mqar_paper import MQARPaper
from train.data.prefetch import iterate

SMALL = MQARConfig(vocab_size=256, length=32, pairs=4)


@dataclasses.dataclass(frozen=True)
class Counting(Batches):
  """Batches whose row r of step s holds s * rows + r; one step may fail."""

  rows: int = 8
  limit: int | None = None
  bad_step: int = -1
  error: type[Exception] = RuntimeError

  length = 2

  @property
  def num_batches(self):
    return self.limit

  @property
  def fingerprint(self):
    return {"data": "counting", "rows": self.rows}

  def read_rows(self, step, start, stop):
    if step == self.bad_step:
      raise self.error(f"step {step} is broken")
    row_B = step * self.rows + np.arange(start, stop)
    return {"tokens": np.stack([row_B, -row_B], axis=1)}


def _steps(batches, start, stop, rows=None):
  with iterate(batches, start=start, stop=stop, rows=rows) as iterator:
    return [batch["tokens"] for batch in iterator]


@pytest.mark.quick
@pytest.mark.parametrize("start", [0, 3, 10**12])
def test_starts_at_the_global_step(start):
  batches = Counting()
  got = _steps(batches, start, start + 5)
  assert len(got) == 5
  for i, tokens in enumerate(got):
    assert tokens[0, 0] == 8 * (start + i)
    np.testing.assert_array_equal(tokens, batches[start + i]["tokens"])


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_the_global_batch(hosts):
  batches, per = Counting(), 8 // hosts
  parts = [
    _steps(batches, 2, 5, slice(host * per, (host + 1) * per))
    for host in range(hosts)
  ]
  for i in range(3):
    joined = np.concatenate([part[i] for part in parts])
    np.testing.assert_array_equal(joined, batches[2 + i]["tokens"])


def test_a_host_reads_only_its_rows():
  tokens = Counting().read(1, slice(2, 5))["tokens"]
  np.testing.assert_array_equal(tokens[:, 0], [10, 11, 12])


@pytest.mark.parametrize(
  "rows",
  [slice(0, 9), slice(4, 4), slice(-2, 4), slice(0, 8, 2), slice(6, 2)],
)
def test_a_wrong_row_slice_is_named(rows):
  with pytest.raises(ValueError, match="rows=slice.*the 8 rows"):
    iterate(Counting(), start=0, stop=1, rows=rows)
  with pytest.raises(ValueError, match="rows=slice.*the 8 rows"):
    Counting().read(0, rows)


@pytest.mark.parametrize(
  ("start", "stop", "field"),
  [(-1, 2, "start=-1"), (3, 2, "stop=2"), (7, 9, "start=7"), (0, 6, "stop=6")],
)
def test_a_wrong_step_range_is_named(start, stop, field):
  with pytest.raises(ValueError, match=field):
    iterate(Counting(limit=5), start=start, stop=stop)


@pytest.mark.parametrize("step", [-1, 5])
def test_steps_outside_the_range_are_index_errors(step):
  with pytest.raises(IndexError, match=f"step={step}"):
    Counting(limit=5)[step]


def test_finite_batches_are_a_sequence():
  assert [batch["tokens"][0, 0] for batch in Counting(limit=3)] == [0, 8, 16]


def test_an_empty_range_ends_at_once():
  assert _steps(Counting(limit=5), 5, 5) == []


@pytest.mark.parametrize("error", [RuntimeError, IndexError, OSError])
def test_an_error_of_the_source_is_raised(error):
  batches = Counting(bad_step=4, error=error)
  with iterate(batches, start=2, stop=9) as iterator:
    assert next(iterator)["tokens"][0, 0] == 16
    next(iterator)
    assert iterator.step == 4
    with pytest.raises(error, match="step 4 is broken"):
      next(iterator)
    with pytest.raises(ValueError, match="closed at step 4"):
      next(iterator)


def test_close_stops_the_thread_and_the_iterator():
  before = set(threading.enumerate())
  iterator = iterate(Counting(), start=0, stop=100)
  next(iterator)
  assert set(threading.enumerate()) - before
  iterator.close()
  iterator.close()
  for thread in set(threading.enumerate()) - before:
    thread.join(timeout=10)
  assert not set(threading.enumerate()) - before
  with pytest.raises(ValueError, match="closed at step 1"):
    next(iterator)


def test_step_counts_the_batches_consumed():
  with iterate(Counting(), start=6, stop=9) as iterator:
    assert iterator.step == 6
    list(iterator)
    assert iterator.step == 9
    with pytest.raises(StopIteration):
      next(iterator)


def test_fingerprints_are_compared_field_by_field():
  saved = {"data": "a", "rows": 8, "power": 0.01, "gone": 1}
  check_fingerprint(json.loads(json.dumps(saved)), saved)
  current = {"data": "a", "rows": 16, "power": 0.01, "new": "x"}
  with pytest.raises(ValueError) as caught:
    check_fingerprint(saved, current)
  message = str(caught.value)
  assert "rows was 8 and is 16" in message
  assert "gone was 1 and is None" in message
  assert "new was None and is 'x'" in message
  assert "power" not in message


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["paper", "stream", "stream_test"])
@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_and_resumes_see_the_same_batches(tmp_path, kind, hosts):
  batches = {
    "paper": MQARPaper(SMALL, rows=8, examples=20, cache_dir=tmp_path),
    "stream": MQARStream(SMALL, seed=3, rows=8),
    "stream_test": stream_test_batches(SMALL, seed=3, examples=50, rows=8),
  }[kind]
  per = 8 // hosts
  parts = []
  for host in range(hosts):
    rows = slice(host * per, (host + 1) * per)
    with iterate(batches, start=1, stop=7, rows=rows) as iterator:
      parts.append(list(iterator))
  for i, shares in enumerate(zip(*parts, strict=True)):
    joined = {k: np.concatenate([x[k] for x in shares]) for k in shares[0]}
    np.testing.assert_equal(joined, batches[1 + i])
  with iterate(batches, start=5, stop=7) as iterator:
    np.testing.assert_equal(next(iterator), batches[5])


def _differing(a, b):
  assert a.keys() == b.keys()
  return [field for field in a if a[field] != b[field]]


@pytest.mark.parametrize(
  ("batches", "changes"),
  [
    (
      MQARStream(SMALL, seed=1, rows=8),
      {"seed": 2, "rows": 16, "split": "test", "examples": 9},
    ),
    (
      MQARPaper(SMALL),
      {
        "seed": 2,
        "rows": 16,
        "drop_last": True,
        "shuffle": False,
        "examples": 9,
        "data_seed": 1,
      },
    ),
  ],
  ids=["stream", "paper"],
)
def test_every_field_that_changes_batches_is_in_the_fingerprint(
  batches, changes
):
  before = batches.fingerprint
  assert json.loads(json.dumps(before)) == before
  for field, value in changes.items():
    changed = dataclasses.replace(batches, **{field: value})
    assert _differing(before, changed.fingerprint) == [field]
  for field, value in {"length": 34, "pairs": 5, "power": 0.5}.items():
    config = dataclasses.replace(SMALL, **{field: value})
    changed = dataclasses.replace(batches, config=config)
    assert _differing(before, changed.fingerprint) == [field]
