"""Batches of text: the same for any number of hosts and workers."""

import dataclasses
import json
from pathlib import Path
import pickle
import subprocess
import sys

from data_cases import EOS, documents, write_megatron, write_prepared
import numpy as np
import pytest

from train.data.batches import check_fingerprint, iterate
from train.data.lm import LMBatches
from train.data.rows import Layout
from train.data.source import DataError

ROOT = Path(__file__).parents[1]
_TEXTS = documents(120, seed=11, most=40)
_LAYOUT = Layout(16, validation=0.2)


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, str]:
  folder = tmp_path_factory.mktemp("sets")
  rows = [x[:17] for x in np.arange(17 * 50).reshape(50, 17)]
  return {
    "prepared": str(write_prepared(folder / "set", (_TEXTS[:50], _TEXTS[50:]))),
    "megatron": str(write_megatron(folder / "d", _TEXTS, cuts=(1001, 2000))),
    "rows": str(write_megatron(folder / "r", rows, cuts=(501,))),
    "cache": str(folder / "plans"),
  }


def _make(paths, *names: str, packing="stream", rows=8, **changes) -> LMBatches:
  layout = dataclasses.replace(_LAYOUT, packing=packing)
  return LMBatches(
    **{
      **dict(paths=tuple(paths[name] for name in names), layout=layout),
      **dict(rows=rows, seed=3, cache_dir=Path(paths["cache"])),
      **changes,
    }
  )


_CASES = {
  "prepared stream": (("prepared",), "stream"),
  "prepared documents": (("prepared",), "documents"),
  "megatron stream": (("megatron",), "stream"),
  "megatron documents": (("megatron",), "documents"),
  "megatron rows": (("rows",), "rows"),
  "mixture": (("prepared", "megatron"), "stream"),
  "packed mixture": (("prepared", "megatron"), "documents"),
}


@pytest.fixture(params=_CASES)
def batches(request, paths) -> LMBatches:
  names, packing = _CASES[request.param]
  return _make(paths, *names, packing=packing)


def _all(batches: LMBatches, start: int, stop: int, **options) -> list[dict]:
  with iterate(batches, start=start, stop=stop, **options) as iterator:
    return list(iterator)


def test_shapes_and_types(batches: LMBatches) -> None:
  batch = batches[0]
  packed = batches.layout.packing == "documents"
  dtypes = dict(tokens="int32", targets="int32", weights="float32")
  dtypes |= dict(segment_ids="int32") if packed else {}
  assert {name: str(x.dtype) for name, x in batch.items()} == dtypes
  assert {x.shape for x in batch.values()} == {(8, 16)}
  np.testing.assert_array_equal(
    batch["tokens"][:, 1:], batch["targets"][:, :-1]
  )
  assert all(x.flags.owndata and x.flags.writeable for x in batch.values())


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_global_batch(batches: LMBatches, hosts: int) -> None:
  per = 8 // hosts
  parts = [
    _all(batches, 5, 9, rows=slice(host * per, (host + 1) * per))
    for host in range(hosts)
  ]
  for i in range(4):
    joined = {
      name: np.concatenate([part[i][name] for part in parts])
      for name in parts[0][i]
    }
    np.testing.assert_equal(joined, batches[5 + i])


def test_a_resume_at_any_step_goes_on(batches: LMBatches) -> None:
  full = _all(batches, 0, 20)
  fresh = pickle.loads(pickle.dumps(batches))
  for start in range(21):
    np.testing.assert_equal(_all(fresh, start, 20), full[start:])


def test_workers_do_not_change_the_batches(paths, tmp_path) -> None:
  """In a process that is no test's, as grain starts others from it."""
  code = """
import pickle, sys
from train.data.batches import iterate
if __name__ == "__main__":
  batches = pickle.loads(open(sys.argv[1], "rb").read())
  result = []
  for workers, start in ((0, 0), (1, 0), (3, 4)):
    with iterate(batches, start=start, stop=9, workers=workers) as data:
      result.append(list(data))
  open(sys.argv[1], "wb").write(pickle.dumps(result))
"""
  batches = _make(paths, "prepared", "megatron", packing="documents")
  (tmp_path / "main.py").write_text(code)
  (tmp_path / "x").write_bytes(pickle.dumps(batches))
  run = subprocess.run(
    [sys.executable, "main.py", "x"],
    cwd=tmp_path,
    env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert run.returncode == 0, run.stderr
  expected = [batches[step] for step in range(9)]
  found = pickle.loads((tmp_path / "x").read_bytes())
  for result, start in zip(found, (0, 0, 4), strict=True):
    np.testing.assert_equal(result, expected[start:])
    assert all(type(x) is np.ndarray for x in result[0].values())


def test_formats_agree(paths) -> None:
  """The order depends on the lengths alone."""
  for packing in ("stream", "documents"):
    a, b = (
      _make(paths, name, packing=packing)[7]
      for name in ("prepared", "megatron")
    )
    np.testing.assert_equal(a, b)


def _count_rows(batches: LMBatches, rows: int) -> dict[bytes, int]:
  counts: dict[bytes, int] = {}
  for step in range(rows // batches.rows):
    for row in batches[step]["tokens"]:
      counts[row.tobytes()] = counts.get(row.tobytes(), 0) + 1
  return counts


def test_an_epoch_has_every_row_once(paths) -> None:
  one = _make(paths, "prepared", rows=1)
  size = len(one.parts[0].plan)
  first = _count_rows(one, size)
  assert set(first.values()) == {1} and len(first) == size
  assert set(_count_rows(one, 3 * size).values()) == {3}
  orders = [
    [one[e * size + i]["tokens"][0].tobytes() for i in range(size)]
    for e in range(2)
  ]
  assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_held_out_rows_are_no_training_rows(paths) -> None:
  for packing in ("stream", "documents"):
    sets = [
      _make(paths, "prepared", packing=packing, split=split)
      for split in ("train", "validation")
    ]
    documents_in = []
    for batches in sets:
      source, plan = batches.parts[0]
      pieces, _ = plan.pieces(np.arange(len(plan)))
      documents_in.append(set(pieces.document_P.tolist()))
    assert not documents_in[0] & documents_in[1]
    assert len(documents_in[1]) > 10


def test_held_out_batches_are_padded(paths) -> None:
  held = _make(paths, "prepared", split="validation", once=True, rows=7)
  size = len(held.parts[0].plan)
  assert held.num_batches == -(-size // 7)
  found = list(held)
  weights = np.concatenate([x["weights"] for x in found])
  assert weights.sum() == size * 16 and (weights[size:] == 0).all()
  rows = np.concatenate([x["tokens"] for x in found])[:size]
  assert len(np.unique(rows, axis=0)) == size
  other = dataclasses.replace(held, seed=99)
  np.testing.assert_equal(list(other), found)
  few = dataclasses.replace(held, limit=3)
  assert few.num_batches == 1
  np.testing.assert_array_equal(few[0]["tokens"][:3], rows[:3])
  assert few[0]["weights"].sum() == 3 * 16


def test_a_stream_runs_over_borders(paths) -> None:
  batches = _make(paths, "megatron", layout=Layout(16, validation=0.0))
  stream = np.concatenate(_TEXTS)
  plain = dataclasses.replace(batches, shuffle=False)
  tokens = np.concatenate([plain[i]["tokens"].ravel() for i in range(3)])
  np.testing.assert_array_equal(tokens, stream[: 3 * 8 * 16])
  targets = np.concatenate([plain[i]["targets"].ravel() for i in range(3)])
  np.testing.assert_array_equal(targets, stream[1 : 3 * 8 * 16 + 1])


def test_ready_rows_keep_their_order(paths) -> None:
  batches = _make(paths, "rows", packing="rows", shuffle=False)
  assert len(batches.parts[0].plan) == 40  # 10 of 50 are held out
  expected = np.arange(17 * 50).reshape(50, 17)
  for step in range(5):
    rows = expected[8 * step : 8 * step + 8]
    np.testing.assert_array_equal(batches[step]["tokens"], rows[:, :-1])
    np.testing.assert_array_equal(batches[step]["targets"], rows[:, 1:])
  np.testing.assert_equal(batches[5], batches[0])


def test_segments_and_weights_follow_the_documents(paths) -> None:
  batches = _make(paths, "prepared", packing="documents", rows=64)
  seen = 0
  for row in range(64):
    batch = {name: x[row] for name, x in batches[0].items()}
    segments, weights = batch["segment_ids"], batch["weights"]
    steps = np.diff(segments)
    assert segments[0] == 1 and set(steps[segments[1:] > 0]) <= {0, 1}
    assert (weights[segments == 0] == 0).all()
    assert (batch["tokens"][segments == 0] == 0).all()
    ends = np.flatnonzero(steps != 0)
    assert (weights[ends] == 0).all()
    seen += len(ends)
    for t in np.flatnonzero(weights[:-1] == 0):
      assert segments[t] == 0 or segments[t + 1] != segments[t]
  assert seen > 20
  total = sum(x["weights"].sum() for x in _once(batches))
  chosen = set(batches.parts[0].plan.document_P.tolist())
  lengths = np.array([len(_TEXTS[i]) for i in chosen])
  assert total == (lengths - 1).sum()  # all but the first of each document


def _once(batches: LMBatches) -> list[dict]:
  return list(dataclasses.replace(batches, once=True))


def test_packed_documents_are_the_documents(paths) -> None:
  whole = _make(
    paths,
    "megatron",
    packing="documents",
    layout=Layout(64, "documents", validation=0.0),
  )
  found = []
  for batch in _once(whole):
    for row in range(8):
      real = batch["weights"][row].any()
      for segment in range(1, batch["segment_ids"][row].max() * real + 1):
        at = batch["segment_ids"][row] == segment
        text = batch["tokens"][row][at].tolist()
        found.append([*text, EOS] if text[-1] != EOS else text)
  expected = [x.tolist() for x in _TEXTS if len(x) > 1]
  assert sorted(found) == sorted(expected)


def test_a_mixture_keeps_its_weights(paths) -> None:
  mixed = _make(paths, "prepared", "rows", weights=(3.0, 1.0), rows=64)
  mixed = dataclasses.replace(mixed, layout=Layout(16, validation=0.0))
  which = np.concatenate(
    [mixed.locate(step * 64 + np.arange(64))[0] for step in range(40)]
  )
  # 2,560 places: five standard deviations of the share are 0.043.
  assert abs(which.mean() - 0.25) < 0.043
  for step in (0, 7):
    set_B, row_B = mixed.locate(step * 64 + np.arange(64))
    for k in (0, 1):
      part = mixed.parts[k]
      for place in np.flatnonzero(set_B == k)[:3]:
        pieces, _ = part.plan.pieces(row_B[place : place + 1])
        row = np.concatenate(
          [
            part.source[d][s : s + n]
            for d, s, n, _ in zip(*pieces, strict=True)
          ]
        )
        np.testing.assert_array_equal(mixed[step]["tokens"][place], row[:-1])


_CHANGES = {
  "seed": dict(seed=4),
  "rows": dict(rows=16),
  "length": dict(layout=Layout(17, validation=0.2)),
  "packing": dict(layout=Layout(16, "documents", validation=0.2)),
  "validation": dict(layout=Layout(16, validation=0.3)),
  "test": dict(layout=Layout(16, validation=0.2, test=0.1)),
  "split": dict(split="validation"),
  "shuffle": dict(shuffle=False),
  "once": dict(once=True),
  "weights": dict(weights=(1.0,)),
  "limit": dict(limit=5),
}


@pytest.mark.parametrize("field", _CHANGES)
def test_the_fingerprint_names_a_changed_field(paths, field: str) -> None:
  batches = _make(paths, "prepared")
  before = json.loads(json.dumps(batches.fingerprint))
  check_fingerprint(before, _make(paths, "prepared").fingerprint)
  after = dataclasses.replace(batches, **_CHANGES[field]).fingerprint
  assert [x for x in before if before[x] != after[x]] == [field]


def test_the_fingerprint_names_changed_files(tmp_path: Path) -> None:
  cache = dict(cache_dir=tmp_path / "plans")
  make = lambda name: (
    LMBatches((str(tmp_path / name),), _LAYOUT, 8, **cache).fingerprint
  )
  write_prepared(tmp_path / "a", (_TEXTS,))
  write_prepared(tmp_path / "moved", (_TEXTS,))
  write_prepared(tmp_path / "tokenizer", (_TEXTS,), tokenizer="bpe")
  other = [np.where(x == 7, 8, x) for x in _TEXTS]
  write_prepared(tmp_path / "tokens", (other,))
  write_prepared(tmp_path / "fewer", (_TEXTS[:-1],))
  before = make("a")
  changed = lambda name: [x for x, y in before.items() if make(name)[x] != y]
  assert changed("moved") == []
  assert changed("tokenizer") == ["index", "tokenizer"]
  assert changed("tokens") == ["index", "blocks"]
  assert changed("fewer") == ["index", "lengths", "blocks"]


def test_refusals(paths, tmp_path: Path) -> None:
  with pytest.raises(ValueError, match="data.path=.*expected a prepared"):
    _make(paths)[0]
  with pytest.raises(DataError, match="nothing: expected a prepared folder"):
    _make(paths | {"no": "nothing"}, "no")[0]
  with pytest.raises(DataError, match="sequence 0 has .* length . 1 = 17"):
    _make(paths, "megatron", packing="rows")[0]
  with pytest.raises(DataError, match="no validation row .* 9001 tokens"):
    layout = Layout(9000, validation=0.2)
    _make(paths, "prepared", split="validation", layout=layout)[0]
  for field, value in {
    "rows": 0,
    "seed": -1,
    "split": "dev",
    "limit": 0,
    "weights": (1.0, 2.0),
  }.items():
    with pytest.raises(ValueError, match=f"{field}="):
      _make(paths, "prepared", **{field: value})
  for field, value in {
    "length": 0,
    "packing": "fit",
    "validation": 1.0,
    "test": 0.9,
  }.items():
    with pytest.raises(ValueError, match=f"{field}="):
      dataclasses.replace(_LAYOUT, **{field: value})


@pytest.mark.parametrize("code", [4, 8])
def test_a_token_beyond_the_vocabulary_is_named(tmp_path, code) -> None:
  texts = [np.arange(20), np.arange(20)]
  texts[1][5] = -3 if code == 4 else 300
  if code == 4:
    path = write_megatron(tmp_path / "d", texts, code=4)
    place, value = "document 1, token 5", "-3: expected 0 to 2147483647"
  else:
    path = write_prepared(tmp_path / "set", (texts,))
    place, value = "document 1, token 5", "300: expected 0 to 256"
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
