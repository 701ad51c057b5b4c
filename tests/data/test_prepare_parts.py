"""Test parts of large files: each record is in exactly one of them."""

import gzip
import json
from pathlib import Path

from prepare_cases import (
  jsonl,
  parquet_bytes,
  quiet,
  records,
  run,
  shard_texts,
  tree,
  zst,
)
import pytest

from train.data.prepare import input_files, prepare_dataset, read_documents
from train.data.prepare.prepare_dataset import PrepareConfig
from train.data.prepare.read_documents import Document

_VALUES = records(40)
_LINES = jsonl(_VALUES)
_FILES = {
  "x.jsonl": _LINES,
  "no end.jsonl": _LINES[:-1],
  "odd.jsonl": b"\xef\xbb\xbf" + _LINES.replace(b"\n", b"\r\n\n \n"),
  "long.jsonl": jsonl([*_VALUES[:3], dict(text="a" * 3000), *_VALUES[3:]]),
  "x.jsonl.gz": gzip.compress(_LINES),
  "x.jsonl.zst": zst(_LINES, 3),
  "x.parquet": parquet_bytes(_VALUES, 3),
}
_BROKEN = {
  # A line of these is broken at byte 900.
  "line.jsonl": _LINES[:900] + b"\xff" + _LINES[900:],
  "too long.jsonl": _LINES[:900] + b"b" * 5000 + _LINES[900:],
  "cut.jsonl.gz": gzip.compress(_LINES)[:-9],
  "trailing.jsonl.gz": gzip.compress(_LINES) + b"trailing",
  "early.jsonl.gz": gzip.compress(_LINES)[:100],
  "cut.jsonl.zst": zst(_LINES, 3)[:-5],
  "trailing.jsonl.zst": zst(_LINES, 3) + b"trailing",
  "column.parquet": parquet_bytes([dict(b="a")] * 9, 2),
  "cut.parquet": parquet_bytes(_VALUES, 3)[:-7],
  "rows.parquet": parquet_bytes([*_VALUES[:5], dict(text=None)], 2),
}


def _read(path: Path, part_bytes: int | None) -> list[list]:
  """Return the documents and problems of each part of a file."""
  nothing, fields = lambda _: None, read_documents.Fields(most_bytes=4000)
  found = input_files.find_sources([str(path)], part_bytes=part_bytes)
  return [
    list(read_documents.read(source, fields, nothing, nothing))
    for source in found.sources
  ]


@pytest.mark.parametrize("name", _FILES)
def test_each_document_is_in_one_part(tmp_path, name):
  path = tmp_path / name
  path.write_bytes(_FILES[name])
  (whole,) = _read(path, None)
  texts = [x.text for x in whole]
  assert len(texts) == 40 + (name == "long.jsonl")
  size = len(_FILES[name]) * (1 if name.endswith(".jsonl") else 4)
  for count in (1, 2, 3, 5, 7, 11, 29, 100):
    parts = _read(path, -(-size // count))
    assert len(parts) == -(-size // -(-size // count))
    assert [x.text for part in parts for x in part] == texts
    # A file of so little text is compressed worse than 4-fold.
    assert sum(map(bool, parts)) > min(count, 13) // 5


@pytest.mark.parametrize("name", _BROKEN)
def test_each_problem_is_in_one_part(tmp_path, name):
  path = tmp_path / name
  path.write_bytes(_BROKEN[name])
  (whole,) = _read(path, None)
  problems = [x for x in whole if not isinstance(x, Document)]
  assert len(problems) == 1
  for part_bytes in (60, 333, 900, 901, 5000):
    found = [x for part in _read(path, part_bytes) for x in part]
    assert [type(x) for x in found] == [type(x) for x in whole]
    (problem,) = [x for x in found if not isinstance(x, Document)]
    assert (problem.reason, problem.lost) == (
      problems[0].reason,
      problems[0].lost,
    )


def test_a_line_that_begins_at_a_boundary_is_in_the_later_part(tmp_path):
  path = tmp_path / "x.jsonl"
  line = jsonl([dict(text="a" * 20)])
  path.write_bytes(line * 6)
  for name, data in (("x.jsonl", line * 6), ("y.jsonl.zst", zst(line * 6))):
    (tmp_path / name).write_bytes(data)
    parts = _read(tmp_path / name, 2 * len(line))
    expected = [2, 2, 2] if name == "x.jsonl" else [2, 2, 2][: len(parts) - 1]
    assert [len(x) for x in parts[: len(expected)]] == expected
    assert sum(len(x) for x in parts) == 6


def test_a_problem_names_the_part_and_the_byte(tmp_path):
  path = tmp_path / "x.jsonl"
  path.write_bytes(_BROKEN["line.jsonl"])
  found = [x for part in _read(path, 700) for x in part]
  (problem,) = [x for x in found if not isinstance(x, Document)]
  begin = path.read_bytes().rindex(b"\n", 0, 900) + 1
  assert problem.where.startswith("x.jsonl, part 2 of ")
  assert problem.where.endswith(f"(byte {begin})")


def _large(path: Path) -> list[str]:
  """Write 2.5 MiB of records; return their texts."""
  values = [dict(text=f"{i:06} " * 750) for i in range(500)]
  path.write_bytes(jsonl(values))
  return [x["text"] for x in values]


def test_workers_and_machines_do_not_change_the_bytes(tmp_path):
  texts = _large(tmp_path / "x.jsonl")
  inputs = [str(tmp_path / "x.jsonl")]
  out, options = tmp_path / "out", dict(part_mb=1)
  dataset = run(inputs, out, **options)
  assert [x["input"]["part"] for x in dataset["shards"]] == [
    [i, 3, 1 << 20] for i in range(3)
  ]
  size = (tmp_path / "x.jsonl").stat().st_size
  assert sum(x["input"]["bytes"] for x in dataset["shards"]) == size
  assert sum(shard_texts(out), []) == texts
  config = PrepareConfig(str(tmp_path / "two"), workers=2, **options)
  prepare_dataset.prepare(config, inputs, quiet())
  assert run(inputs, tmp_path / "parts", shard="1/2", **options) is None
  assert run(inputs, tmp_path / "parts", shard="0/2", **options) is not None
  assert tree(out) == tree(tmp_path / "two") == tree(tmp_path / "parts")


def test_a_lost_part_is_made_again_alone(tmp_path):
  _large(tmp_path / "x.jsonl")
  inputs, out = [tmp_path / "x.jsonl"], tmp_path / "out"
  run(inputs, out, part_mb=1)
  whole = tree(out)
  (out / "prepare" / "shard-00001.json").unlink()
  (out / "dataset.json").unlink()
  times = {x: x.stat().st_mtime_ns for x in out.rglob("shard-*")}
  run(inputs, out, part_mb=1)
  assert tree(out) == whole
  made = [x for x in times if x.stat().st_mtime_ns != times[x]]
  assert made and all("shard-00001" in x.name for x in made)
  for options, was in ((dict(part_mb=2), "3 parts, is in 2"), ({}, "is in 1")):
    with pytest.raises(ValueError, match=f"input x.jsonl was in .*{was}"):
      run(inputs, out, **options)


def test_a_change_in_the_share_of_a_part_is_named(tmp_path):
  _large(tmp_path / "x.jsonl")
  inputs, out = [tmp_path / "x.jsonl"], tmp_path / "out"
  run(inputs, out, part_mb=1)
  data = bytearray((tmp_path / "x.jsonl").read_bytes())
  data[len(data) // 2] ^= 1
  (tmp_path / "x.jsonl").write_bytes(data)
  with pytest.raises(ValueError, match="x.jsonl changed since shard-00001"):
    run(inputs, out, part_mb=1)
  with pytest.raises(ValueError, match="part_mb=0: expected an integer ≥ 1"):
    run(inputs, out, part_mb=0)


def test_files_that_are_not_split_keep_their_plan(tmp_path):
  (tmp_path / "x.jsonl").write_bytes(_LINES)
  (tmp_path / "y.txt").write_text("a" * 3_000_000)
  out = tmp_path / "out"
  dataset = run([tmp_path / "x.jsonl", tmp_path / "y.txt"], out, part_mb=1)
  plan = json.loads((out / "prepare" / "plan.json").read_text())
  assert [list(x) for x in plan["sources"]] == [["name", "kind", "files"]] * 2
  assert all("part" not in x["input"] for x in dataset["shards"])
