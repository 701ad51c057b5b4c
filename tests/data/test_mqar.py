"""Test MQAR rows, and the unlimited stream of them."""

import dataclasses
import math

import numpy as np
import pytest

from train.data.mqar import (
  MQARConfig,
  MQARStream,
  in_test_split,
  stream_examples,
  stream_test_batches,
)
from train.data.mqar_paper import paper_examples

SMALL = MQARConfig(vocab_size=256, length=32, pairs=4)
GOLDEN_RATIO = 0x9E3779B97F4A7C15


def _decode(tokens, pairs):
  """Read one row: return the (position, value) of every query."""
  tokens = tokens.tolist()
  memory = {tokens[2 * i]: tokens[2 * i + 1] for i in range(pairs)}
  tail = range(2 * pairs, len(tokens))
  return [(p, memory[tokens[p]]) for p in tail if tokens[p] != 0]


def _check_rows(config, batch):
  """Check that every row is an MQAR row."""
  V, T, N = config.vocab_size, config.length, config.pairs
  rows = len(batch["tokens"])
  shapes = {name: (x.shape, x.dtype.name) for name, x in batch.items()}
  assert shapes == {
    "tokens": ((rows, T), "int32"),
    "positions": ((rows, N), "int32"),
    "targets": ((rows, N), "int32"),
    "weights": ((rows, N), "float32"),
  }
  for i, tokens in enumerate(batch["tokens"]):
    found = list(zip(batch["positions"][i], batch["targets"][i], strict=True))
    assert _decode(tokens, N) == found
    keys, values = tokens[0 : 2 * N : 2], tokens[1 : 2 * N : 2]
    assert sorted(tokens[batch["positions"][i]]) == sorted(keys)
    assert len(set(keys.tolist())) == len(set(values.tolist())) == N
    assert keys.min() >= 1
    assert keys.max() < V // 2 <= values.min()
    assert values.max() < V
    assert np.all(np.diff(batch["positions"][i]) > 0)
    assert np.all(batch["positions"][i] % 2 == 0)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"length": 33}, "length=33: expected an even number"),
    ({"pairs": 9}, "pairs=9: expected at most length/4=8"),
    ({"pairs": 0}, "pairs=0: expected a positive integer"),
    ({"vocab_size": 32}, "vocab_size=32: expected more than length=32"),
    ({"length": 32.0}, "length=32.0: expected a positive integer"),
    ({"power": 0.0}, "power=0.0: expected a positive number"),
    ({"power": math.nan}, "power=nan: expected a positive number"),
  ],
)
def test_a_wrong_config_names_field_value_and_rule(fields, message):
  with pytest.raises(ValueError) as caught:
    dataclasses.replace(SMALL, **fields)
  assert str(caught.value) == message


def test_the_tightest_config_has_enough_keys_and_values():
  config = MQARConfig(vocab_size=5, length=4, pairs=1)
  assert (config.num_keys, config.num_values, config.num_gaps) == (1, 3, 1)
  for pairs in range(1, 40):
    config = MQARConfig(4 * pairs + 1, 4 * pairs, pairs)
    assert min(config.num_keys, config.num_values, config.num_gaps) >= pairs


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
  "config",
  [
    SMALL,
    MQARConfig(8192, 64, 16),
    MQARConfig(33, 32, 8),
    MQARConfig(19, 4, 1),
  ],
  ids=str,
)
def test_stream_rows_are_valid(config, split):
  batch = MQARStream(config, seed=5, rows=64, split=split)[3]
  _check_rows(config, batch)
  assert batch["weights"].all()


def test_stream_examples_do_not_depend_on_the_batch_size():
  narrow, wide = (MQARStream(SMALL, seed=5, rows=rows) for rows in (4, 12))
  joined = [narrow[3 + i]["tokens"] for i in range(3)]
  np.testing.assert_array_equal(np.concatenate(joined), wide[1]["tokens"])
  keys = [stream_examples(SMALL, 5, "train", np.array([i])) for i in (9, 2)]
  both = stream_examples(SMALL, 5, "train", np.array([9, 2]))
  for i in range(2):
    for part in range(3):
      np.testing.assert_array_equal(keys[i][part][0], both[part][i])


def test_stream_seeds_splits_and_steps_differ():
  seen = {
    MQARStream(SMALL, seed, 64, split)[step]["tokens"].tobytes()
    for seed in (0, 1)
    for split in ("train", "test")
    for step in (0, 1, 10**12)
  }
  assert len(seen) == 12


def _mix(x):
  """Apply splitmix64's finalizer to a Python integer."""
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
  return x ^ (x >> 31)


def _hash(*words):
  state = 0
  for word in words:
    state = _mix((state + word + GOLDEN_RATIO) % 2**64)
  return state


def _slots(state, count):
  steps = range(1, count + 1)
  return [_mix((state + GOLDEN_RATIO * j) % 2**64) for j in steps]


def _plain_example(config, seed, split, index):
  """Make one example of the stream in plain Python."""
  V, N = config.vocab_size, config.pairs
  base = _hash(seed, ("train", "test").index(split), index)
  for draw in range(100):
    key_hash = _slots(_hash(base, 0, draw), V // 2 - 1)
    value_hash = _slots(_hash(base, 1, draw), V - V // 2)
    keys = [1 + i for i in np.argsort(key_hash)[:N].tolist()]
    values = [V // 2 + i for i in np.argsort(value_hash)[:N].tolist()]
    pairs = enumerate(zip(keys, values, strict=True))
    content = sum(_hash(i, key, value) for i, (key, value) in pairs) % 2**64
    if (_hash(content) % 8 == 0) == (split == "test"):
      break
  gap_hash = _slots(_hash(base, 2), config.num_gaps)
  times = [
    -math.log((h // 2**11 + 0.5) / 2**53) * (g + 1) ** (1 - config.power)
    for g, h in enumerate(gap_hash)
  ]
  return keys, values, np.argsort(times)[:N].tolist()


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_stream_equals_plain_python(seed, split):
  config = MQARConfig(1000, 64, 9)
  index = np.array([0, 1, 2, 3, 12_345, 2**40])
  parts = stream_examples(config, seed, split, index)
  for i, number in enumerate(index.tolist()):
    expected = _plain_example(config, seed, split, number)
    assert tuple(part[i].tolist() for part in parts) == expected


@pytest.mark.quick
def test_stream_is_pinned():
  """If these rows change, the fingerprint needs a new version."""
  batch = MQARStream(SMALL, seed=0, rows=4)[1]
  assert batch["tokens"][0].tolist() == (
    [66, 209, 6, 174, 88, 182, 3, 134]
    + [6, 0, 66]
    + 15 * [0]
    + [88, 0, 0, 0, 3, 0]
  )
  assert batch["targets"][0].tolist() == [174, 209, 182, 134]


def test_train_and_test_are_disjoint_whatever_the_seed():
  """Each split sees all of its share of 4,032 pair lists and no other."""
  config = MQARConfig(vocab_size=17, length=8, pairs=2)
  lists = {}
  for split, seed, count in (("train", 1, 40_000), ("test", 2, 6_000)):
    keys, values, _ = stream_examples(config, seed, split, np.arange(count))
    assert np.all(in_test_split(keys, values) == (split == "test"))
    rows = np.concatenate([keys, values], axis=1).tolist()
    lists[split] = {tuple(row) for row in rows}
  total = 7 * 6 * 9 * 8
  assert not lists["train"] & lists["test"]
  assert len(lists["train"]) + len(lists["test"]) == total
  assert 0.10 < len(lists["test"]) / total < 0.15


def test_a_split_without_pair_lists_is_an_error():
  config = MQARConfig(vocab_size=5, length=4, pairs=1)
  keys, values = np.ones((3, 1), int), np.arange(2, 5)[:, None]
  assert not in_test_split(keys, values).any()
  with pytest.raises(ValueError, match="split='test': no pair list"):
    MQARStream(config, seed=0, rows=2, split="test")[0]


def test_stream_test_batches_are_padded():
  batches = stream_test_batches(SMALL, seed=5, examples=20, rows=8)
  assert batches.num_batches == 3
  last = batches[2]
  _check_rows(SMALL, last)
  np.testing.assert_array_equal(last["weights"][:, 0], 4 * [1] + 4 * [0])
  unlimited = MQARStream(SMALL, seed=5, rows=8, split="test")[2]
  np.testing.assert_array_equal(last["tokens"][:4], unlimited["tokens"][:4])
  with pytest.raises(IndexError, match="step=3"):
    batches[3]


@pytest.mark.parametrize(
  ("field", "value"),
  [("rows", 0), ("seed", -1), ("split", "valid"), ("examples", 0)],
)
def test_wrong_stream_fields_are_named(field, value):
  with pytest.raises(ValueError, match=f"{field}="):
    dataclasses.replace(MQARStream(SMALL, 0, 8), **{field: value})


def _chi_square_fits(counts, expected):
  """Return whether chi-square is within 4.5 deviations of its mean."""
  assert expected.min() >= 5
  chi = np.sum((counts - expected) ** 2 / expected)
  degrees = len(expected) - 1
  return abs(chi - degrees) < 4.5 * math.sqrt(2 * degrees)


@pytest.fixture(scope="module")
def many():
  return stream_examples(SMALL, 11, "train", np.arange(40_000))


@pytest.mark.parametrize("slot", [0, 3])
def test_keys_and_values_are_uniform(many, slot):
  keys, values, _ = many
  for tokens, first, count in ((keys, 1, 127), (values, 128, 128)):
    counts = np.bincount(tokens[:, slot] - first, minlength=count)
    assert _chi_square_fits(counts, np.full(count, len(tokens) / count))


def test_pairs_of_keys_are_uniform():
  config = MQARConfig(vocab_size=17, length=16, pairs=4)
  keys, values, _ = stream_examples(config, 1, "train", np.arange(20_000))
  for first, second in ((keys[:, 0], keys[:, 1]), (keys[:, 2], values[:, 2])):
    cells = np.unique(first * 100 + second, return_counts=True)[1]
    assert len(cells) in (7 * 6, 7 * 9)
    assert _chi_square_fits(cells, np.full(len(cells), 20_000 / len(cells)))


def test_gaps_have_the_probabilities_of_the_paper(many):
  """Compare the first two gaps with their exact probabilities."""
  gaps, G = many[2], SMALL.num_gaps
  assert G == 12
  p = np.array([0.01 * (g + 1) ** (0.01 - 1) for g in range(G)])
  p /= p.sum()
  second = np.array(
    [
      sum(p[h] * p[g] / (1 - p[h]) for h in range(G) if h != g)
      for g in range(G)
    ]
  )
  for slot, odds in ((0, p), (1, second)):
    counts = np.bincount(gaps[:, slot], minlength=G)
    assert _chi_square_fits(counts, odds * len(gaps))
  uniform = np.full(G, len(gaps) / G)
  assert not _chi_square_fits(np.bincount(gaps[:, 3], minlength=G), uniform)


def test_the_stream_has_the_distribution_of_the_paper(many):
  """Compare every gap with 10,000 rows of the paper's generator."""
  reference = paper_examples(SMALL, 10_000, 1)[2]
  for slot in range(SMALL.pairs):
    a = np.bincount(many[2][:, slot], minlength=SMALL.num_gaps)
    b = np.bincount(reference[:, slot], minlength=SMALL.num_gaps)
    p = (a + b) / 50_000
    chi = np.sum((a / 40_000 - b / 10_000) ** 2 / (p * (1 / 4e4 + 1 / 1e4)))
    assert chi < 11 + 4.5 * math.sqrt(22)
