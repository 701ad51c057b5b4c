"""Test batches of text: rows, splits, mixtures, hosts and workers."""

import dataclasses
import pickle
import subprocess
import sys

from data_cases import EOS, write_megatron
from lm_cases import ROOT, TEXTS, batches as batches, make, paths as paths, take
import numpy as np
import pytest

from train.data.text.lm_batches import LMBatches
from train.data.text.rows import Layout


@pytest.mark.quick
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
    take(batches, 5, 9, rows=slice(host * per, (host + 1) * per))
    for host in range(hosts)
  ]
  for i in range(4):
    joined = {
      name: np.concatenate([part[i][name] for part in parts])
      for name in parts[0][i]
    }
    np.testing.assert_equal(joined, batches[5 + i])


def test_a_resume_at_any_step_continues(batches: LMBatches) -> None:
  full = take(batches, 0, 20)
  fresh = pickle.loads(pickle.dumps(batches))
  for start in range(21):
    np.testing.assert_equal(take(fresh, start, 20), full[start:])


def test_workers_do_not_change_the_batches(paths, tmp_path) -> None:
  """Run in another process, because grain starts more from it."""
  code = """
import pickle, sys
from train.data.prefetch import iterate
if __name__ == "__main__":
  batches = pickle.loads(open(sys.argv[1], "rb").read())
  result = []
  for workers, start in ((0, 0), (1, 0), (3, 4)):
    with iterate(batches, start=start, stop=9, workers=workers) as data:
      result.append(list(data))
  with iterate(batches, start=0, stop=9, workers=1) as data:
    next(data)  # and no more
  open(sys.argv[1], "wb").write(pickle.dumps(result))
"""
  batches = make(paths, "prepared", "megatron", packing="documents")
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
  for trace in ("leaked", "Exception ignored", "Traceback"):
    assert trace not in run.stderr
  expected = [batches[step] for step in range(9)]
  found = pickle.loads((tmp_path / "x").read_bytes())
  for result, start in zip(found, (0, 0, 4), strict=True):
    np.testing.assert_equal(result, expected[start:])
    arrays = result[0].values()
    assert all(type(x) is np.ndarray and x.flags.writeable for x in arrays)


def test_both_formats_give_the_same_batches(paths) -> None:
  """The order depends only on the lengths of the documents."""
  for packing in ("stream", "documents"):
    a, b = (
      make(paths, name, packing=packing)[7] for name in ("prepared", "megatron")
    )
    np.testing.assert_equal(a, b)


def _count_rows(batches: LMBatches, rows: int) -> dict[bytes, int]:
  counts: dict[bytes, int] = {}
  for step in range(rows // batches.rows):
    for row in batches[step]["tokens"]:
      counts[row.tobytes()] = counts.get(row.tobytes(), 0) + 1
  return counts


def test_an_epoch_has_every_row_once(paths) -> None:
  one = make(paths, "prepared", rows=1)
  size = len(one.parts[0].plan)
  first = _count_rows(one, size)
  assert set(first.values()) == {1} and len(first) == size
  assert set(_count_rows(one, 3 * size).values()) == {3}
  orders = [
    [one[e * size + i]["tokens"][0].tobytes() for i in range(size)]
    for e in range(2)
  ]
  assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_held_out_rows_are_not_training_rows(paths) -> None:
  for packing in ("stream", "documents"):
    sets = [
      make(paths, "prepared", packing=packing, split=split)
      for split in ("train", "validation")
    ]
    documents_in = []
    for one in sets:
      source, plan = one.parts[0]
      pieces, _ = plan.pieces(np.arange(len(plan)))
      documents_in.append(set(pieces.document_P.tolist()))
    assert not documents_in[0] & documents_in[1]
    assert len(documents_in[1]) > 10


@pytest.mark.parametrize("name", ["prepared", "one"])
def test_the_end_of_a_text_can_be_held_out(paths, tmp_path, name) -> None:
  """Even of a single document, whose beginning is then trained on."""
  texts = TEXTS if name == "prepared" else [np.concatenate(TEXTS)]
  if name == "one":
    paths = paths | {"one": str(write_megatron(tmp_path / "one", texts))}
  layout = Layout(16, validation=0.1, test=0.2, held_out="end")
  stream, sizes, first = np.concatenate(texts), {}, 0
  for split in ("train", "validation", "test"):
    batches = make(paths, name, layout=layout, split=split, shuffle=False)
    plan = batches.parts[0].plan
    sizes[split] = len(plan)
    rows = np.concatenate([batches[step]["tokens"] for step in range(2)])
    for r in range(min(16, len(plan))):
      place = 16 * (first + r)
      np.testing.assert_array_equal(rows[r], stream[place : place + 16])
    first += len(plan)
  total = (len(stream) - 1) // 16
  assert sum(sizes.values()) == total
  assert sizes["validation"] == total // 10 and sizes["test"] == total // 5
  whole = make(paths, name, layout=Layout(16, validation=0.0)).parts[0].plan
  assert len(whole) == total
  with pytest.raises(ValueError, match="held_out='end': expected 'documents'"):
    Layout(16, "documents", held_out="end")
  with pytest.raises(ValueError, match="held_out='start'"):
    Layout(16, held_out="start")
  if name == "one":
    few = Layout(16, validation=0.1)
    held = make(paths, name, layout=few, split="validation")
    with pytest.raises(ValueError, match="held_out='end' holds out the end"):
      held.read(0)


def test_held_out_batches_are_padded(paths) -> None:
  held = make(paths, "prepared", split="validation", once=True, rows=7)
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


def test_a_limit_is_shared_by_the_weights(paths) -> None:
  """5 rows of a mixture 3 : 1 are 3.75 and 1.25, each rounded up."""
  options = dict(split="validation", once=True, rows=8, weights=(3.0, 1.0))
  mixed = make(paths, "prepared", "megatron", **options)
  few = dataclasses.replace(mixed, limit=5)
  assert few.num_batches == 1
  assert few[0]["weights"].any(axis=1).sum() == 4 + 2
  sets_B, _ = few.locate(np.arange(8))
  assert sets_B[:6].tolist() == [0] * 4 + [1] * 2


def test_a_stream_crosses_document_boundaries(paths) -> None:
  batches = make(paths, "megatron", layout=Layout(16, validation=0.0))
  stream = np.concatenate(TEXTS)
  plain = dataclasses.replace(batches, shuffle=False)
  tokens = np.concatenate([plain[i]["tokens"].ravel() for i in range(3)])
  np.testing.assert_array_equal(tokens, stream[: 3 * 8 * 16])
  targets = np.concatenate([plain[i]["targets"].ravel() for i in range(3)])
  np.testing.assert_array_equal(targets, stream[1 : 3 * 8 * 16 + 1])


def test_ready_rows_keep_their_order(paths) -> None:
  batches = make(paths, "rows", packing="rows", shuffle=False)
  assert len(batches.parts[0].plan) == 40  # 10 of 50 are held out
  expected = np.arange(17 * 50).reshape(50, 17)
  for step in range(5):
    rows = expected[8 * step : 8 * step + 8]
    np.testing.assert_array_equal(batches[step]["tokens"], rows[:, :-1])
    np.testing.assert_array_equal(batches[step]["targets"], rows[:, 1:])
  np.testing.assert_equal(batches[5], batches[0])


@pytest.mark.quick
def test_segments_and_weights_follow_the_documents(paths) -> None:
  batches = make(paths, "prepared", packing="documents", rows=64)
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
  lengths = np.array([len(TEXTS[i]) for i in chosen])
  assert total == (lengths - 1).sum()  # all but the first of each document


def _once(batches: LMBatches) -> list[dict]:
  return list(dataclasses.replace(batches, once=True))


def test_packed_documents_are_the_documents(paths) -> None:
  whole = make(
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
  expected = [x.tolist() for x in TEXTS if len(x) > 1]
  assert sorted(found) == sorted(expected)


def test_a_mixture_keeps_its_weights(paths) -> None:
  mixed = make(paths, "prepared", "rows", weights=(3.0, 1.0), rows=64)
  mixed = dataclasses.replace(mixed, layout=Layout(16, validation=0.0))
  which = np.concatenate(
    [mixed.locate(step * 64 + np.arange(64))[0] for step in range(40)]
  )
  # 2,560 places: five standard deviations of the share are 0.043.
  assert abs(which.mean() - 0.25) < 0.043
  other = dataclasses.replace(mixed, seed=mixed.seed + 1)
  assert (other.locate(np.arange(64))[0] != which[:64]).any()
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
