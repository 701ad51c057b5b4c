"""Test malformed text: each problem is a named error or a counted skip."""

import gzip
import json
import os
from pathlib import Path
import random

from array_record.python.array_record_module import ArrayRecordReader
import numpy as np
from prepare_cases import (
  jsonl,
  parquet_bytes,
  read,
  records,
  run,
  shard_texts,
  zst,
)
import pyarrow as pa
from pyarrow import parquet
import pytest

from train.data.prepare import (
  input_files,
  read_documents,
  read_lines,
  shard as prepare_shard,
  tokenizer,
)
from train.data.prepare.shard import Job, PrepareError

_GOOD = jsonl(records(6))
_LINES = _GOOD.splitlines(keepends=True)
_BYTES = tokenizer.load("bytes")


def _with(line: bytes, at: int = 2) -> bytes:
  return b"".join([*_LINES[:at], line + b"\n", *_LINES[at:]])


@pytest.mark.parametrize(
  "line, reason",
  [
    (b'{"text": "a\xff"}', "broken UTF-8 at byte 11"),
    (b'{"text": "a\xc3"}', "broken UTF-8 at byte 11"),
    (b'{"text": null}', "text is null: expected a string"),
    (b'{"text": 3}', "text is of type int"),
    (b'{"txt": "a"}', "no field 'text'; there are ['txt']"),
    (b"null", "expected an object, not null"),
    (b'["text"]', "expected an object, not of type list"),
    (b'{"text": "a"', "not JSON"),
    (b'{"text": "a\0"}', "not JSON"),
    (b"\0\0\0", "not JSON"),
    (b'{"text": "\\ud800"}', "half a surrogate pair at character 0"),
    (b'{"text": "a", "meta": {"pile_set_name": 3}}', "of type int"),
    (b"[" * 100_000, "too deeply nested"),
    (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "not JSON"),
    (b'{"text": "a"}\r\xff', "broken UTF-8"),
  ],
)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path, line, reason):
  path = tmp_path / "x.jsonl"
  path.write_bytes(_with(line))
  offset = sum(map(len, _LINES[:2]))
  with pytest.raises(PrepareError) as error:
    run([path], tmp_path / "out")
  assert str(error.value).startswith(f"x.jsonl, line 3 (byte {offset}): ")
  assert reason in str(error.value)
  dataset = run([path], tmp_path / "out", on_error="skip")
  assert (dataset["documents"], dataset["skipped"]) == (6, 1)
  assert dataset["shards"][0]["skipped"] == 1
  record = tmp_path / "out" / "prepare" / "shard-00000.json"
  (problem,) = json.loads(record.read_text())["problems"]
  assert f"{problem}; --on-error skip counts it and continues" == str(
    error.value
  )


def test_unusual_but_valid_text_is_kept(tmp_path):
  values = ["a\0b", "\u2028line\u2029", "a\r\nb\rc", "<|endoftext|>", "𝄞"]
  path = tmp_path / "x.jsonl"
  data = jsonl([dict(text=value) for value in values])
  path.write_bytes(b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n")[:-2])
  run([path], tmp_path / "out")
  assert shard_texts(tmp_path / "out") == [values]


def _parts(path: Path) -> tuple[list[str], list[read_documents.Problem]]:
  found = read(path)
  return (
    [x.text for x in found if isinstance(x, read_documents.Document)],
    [x for x in found if isinstance(x, read_documents.Problem)],
  )


_TEXTS = [value["text"] for value in records(400)]
_LONG = jsonl(records(400))


@pytest.mark.parametrize("cut", [1, 5, 100, 1000])
@pytest.mark.parametrize(
  "name, compress", [("x.jsonl.zst", zst), ("x.jsonl.gz", gzip.compress)]
)
def test_a_truncated_stream_gives_the_text_before(
  tmp_path, name, compress, cut
):
  data = compress(_LONG)
  (tmp_path / name).write_bytes(data[:-cut])
  texts, (problem,) = _parts(tmp_path / name)
  assert texts == _TEXTS[: len(texts)]
  # gzip gives the bytes before the cut; zstd gives only whole blocks.
  assert name in problem.where and f"line {len(texts) + 1} " in problem.where
  assert (
    "zstd stream is truncated" in problem.reason or "gzip" in problem.reason
  )


def test_whole_frames_before_a_truncation_are_kept(tmp_path):
  half = len(jsonl(records(200)))
  data = zst(_LONG[:half]) + zst(_LONG[half:])[:-20]
  (tmp_path / "x.jsonl.zst").write_bytes(data)
  texts, (problem,) = _parts(tmp_path / "x.jsonl.zst")
  assert len(texts) >= 200 and texts == _TEXTS[: len(texts)]
  assert f"at byte {len(data)}" in problem.reason.replace(",", "")


@pytest.mark.parametrize(
  "name, data, reason, documents",
  [
    ("x.jsonl.zst", gzip.compress(_GOOD), "damaged zstd", 0),
    ("x.jsonl.gz", zst(_GOOD), "damaged gzip", 0),
    ("x.jsonl.zst", zst(_GOOD) + b"trailing", "damaged zstd", 6),
    ("x.jsonl.gz", gzip.compress(_GOOD) + b"trailing", "damaged gzip", 6),
    ("x.jsonl.gz", gzip.compress(_GOOD)[:-8] + b"\0" * 8, "CRC", 6),
    ("x.jsonl.zst", b"", "empty", 0),
    ("x.jsonl.gz", b"", "empty", 0),
    ("x.jsonl", b"", "empty", 0),
    ("x.jsonl", b"\n\n", "empty", 0),
    ("x.parquet", b"", "not readable as Parquet", 0),
    ("x.parquet", parquet_bytes(records(6))[:-9], "not readable as Parquet", 0),
    ("x.parquet", _GOOD, "not readable as Parquet", 0),
    ("x.parquet", parquet_bytes([dict(b="a")] * 3), "no column 'text'", 0),
    ("x.txt", b"ab\xff", "broken UTF-8 at byte 2", 0),
    ("x.txt", b"ab\0", "a NUL at byte 2", 0),
  ],
)
def test_a_bad_file_is_named(tmp_path, name, data, reason, documents):
  path, out = tmp_path / name, tmp_path / "out"
  path.write_bytes(data)
  with pytest.raises(PrepareError) as error:
    run([path], out)
  assert str(error.value).startswith(name)
  assert reason in str(error.value)
  if documents:
    dataset = run([path], out, on_error="skip")
    assert (dataset["documents"], dataset["skipped"]) == (documents, 1)
  else:
    with pytest.raises(PrepareError, match="no document was found in 1 inputs"):
      run([path], out, on_error="skip")
    assert not (out / "dataset.json").exists()


def test_rows_of_parquet_are_named_and_lost_groups_counted(tmp_path):
  path = tmp_path / "x.parquet"
  table = pa.table(dict(text=pa.array(["a", None, "c"])))
  parquet.write_table(table, path)
  texts, (problem,) = _parts(path)
  assert texts == ["a", "c"]
  assert str(problem) == "x.parquet, row 1: text is null: expected a string"
  raw = pa.array([b"good", b"b\xff"]).cast(pa.string(), safe=False)
  parquet.write_table(pa.table(dict(text=raw)), path)
  texts, (problem,) = _parts(path)
  assert texts == ["good"]
  assert "row 1: broken UTF-8 at byte 1" in str(problem)
  # The second of three row groups is overwritten.
  parquet.write_table(
    pa.table(dict(text=[f"{i:0100}" for i in range(30)])),
    path,
    row_group_size=10,
    compression="zstd",
    use_dictionary=False,
    write_page_checksum=True,
  )
  column = parquet.ParquetFile(path).metadata.row_group(1).column(0)
  data = bytearray(path.read_bytes())
  end = column.data_page_offset + column.total_compressed_size
  data[end - 20 : end] = b"\xaa" * 20
  path.write_bytes(data)
  texts, (problem,) = _parts(path)
  assert texts == [f"{i:0100}" for i in (*range(10), *range(20, 30))]
  assert problem.lost == 10 and "row 10 (row group 1)" in problem.where


def test_too_long_lines_need_no_memory_and_the_next_is_read():
  chunks = [b"ab\n", *[b"x" * 1000] * 50, b"\ncd\n", b"y" * 2000]
  found = list(read_lines.lines(iter(chunks), 100))
  assert [x.number for x in found] == [1, 2, 3, 4]
  assert [x.data for x in found] == [b"ab", None, b"cd", None]
  assert [x.offset for x in found] == [0, 3, 50_004, 50_007]
  assert "50,000 bytes: expected at most 100" in found[1].reason


def test_a_line_may_span_reads():
  data = b"one\n\ntwo three\nfour"
  for size in range(1, len(data)):
    chunks = [data[i : i + size] for i in range(0, len(data), size)]
    found = list(read_lines.lines(iter(chunks), 100))
    assert [x.data for x in found] == data.split(b"\n")
    assert all(data[x.offset :].startswith(x.data) for x in found)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
  path = tmp_path / "x.jsonl"
  path.write_bytes(_GOOD)
  (source,) = input_files.find_sources([str(path)]).sources
  path.write_bytes(_GOOD + _GOOD)
  (tmp_path / "out" / "prepare").mkdir(parents=True)
  job = Job(
    0, source, str(tmp_path / "out"), read_documents.Fields(), skip=True
  )
  with pytest.raises(PrepareError, match=r"x.jsonl: it has .* expected"):
    prepare_shard.write_shard(job, _BYTES, lambda _: None, lambda: False)
  # Another text of the same size shows in the file's time alone.
  path.write_bytes(_GOOD)
  change = lambda _: os.utime(path, (1, 1))
  with pytest.raises(PrepareError, match="x.jsonl: it changed while it was"):
    prepare_shard.write_shard(job, _BYTES, change, lambda: False)
  assert not [x for x in (tmp_path / "out").rglob("*") if x.is_file()]


_FORMATS = {
  "x.jsonl": _GOOD,
  "x.jsonl.gz": gzip.compress(_GOOD),
  "x.jsonl.zst": zst(_GOOD, 2),
  "x.parquet": parquet_bytes(records(6), 2),
  "x.txt": "\n".join(value["text"] for value in records(6)).encode(),
}


def _mutated(data: bytes, random: random.Random) -> bytes:
  out = bytearray(data)
  for _ in range(random.choice((1, 1, 2, 8))):
    at = random.randrange(len(out) + 1)
    match random.randrange(6):
      case 0:
        out[at : at + 1] = random.randbytes(1)
      case 1:
        out = out[:at]
      case 2:
        del out[at : at + random.randrange(1, 40)]
      case 3:
        out[at:at] = random.randbytes(random.randrange(1, 40))
      case 4:
        out[at:at] = random.choice((b"\0", b"\n", b'"', b"\xed\xa0\x80", b"{"))
      case 5:
        begin = random.randrange(len(out) + 1)
        out[at:at] = out[begin : begin + 50]
    if not out:
      break
  return bytes(out)


@pytest.mark.parametrize("name", _FORMATS)
def test_fuzzed_files_are_read_named_or_counted(tmp_path, name):
  """Try 250 seeded mutations of each format."""
  path, out = tmp_path / name, tmp_path / "out"
  (out / "prepare").mkdir(parents=True)
  seeded, failures = random.Random(f"fuzz {name}"), 0
  for _ in range(250):
    path.write_bytes(_mutated(_FORMATS[name], seeded))
    (source,) = input_files.find_sources([str(path)]).sources
    make = lambda skip, source=source: prepare_shard.write_shard(
      Job(0, source, str(out), read_documents.Fields(), skip),
      _BYTES,
      lambda _: None,
      lambda: False,
    )
    error = None
    try:
      strict = make(False)["shard"]
    except PrepareError as caught:
      error = caught
    shard = make(True)["shard"]
    if error is None:
      assert shard == strict and shard["skipped"] == 0
    else:
      assert str(error).startswith(name) and ": " in str(error)
      assert shard["skipped"] >= 1
      failures += 1
    found = read(path)
    documents = [x for x in found if isinstance(x, read_documents.Document)]
    lost = sum(x.lost for x in found if isinstance(x, read_documents.Problem))
    assert shard["documents"] + shard["empty"] == len(documents)
    assert shard["skipped"] == lost
    lengths = np.load(out / "shard-00000.lengths.npy")
    reader = ArrayRecordReader(str(out / "shard-00000.arrayrecord"))
    assert reader.num_records() == len(lengths) == shard["documents"]
    reader.close()
    if name == "x.jsonl":  # every line is accounted for
      lines = [x for x in path.read_bytes().split(b"\n") if x.strip()]
      assert len(documents) + lost == max(len(lines), 1)
  assert failures > 25  # the mutations do break things
