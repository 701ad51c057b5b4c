"""Test that files that expand a lot take little memory, or are refused."""

import gzip
import io
import os
from pathlib import Path
import subprocess
import sys
from types import SimpleNamespace

from prepare_cases import jsonl, parquet_bytes, read, records
import pyarrow as pa
from pyarrow import parquet
import pytest
import zstandard

from train.data.prepare import read_documents
from train.data.prepare.parquet_pages import PageError, largest_page
from train.data.prepare.read_documents import Document

_ROOT = Path(__file__).parents[2]
_MIB = 1 << 20

# Reads files, and prints the memory that they need in MiB.
_MEASURE = """
import resource, sys
import pyarrow.parquet, zstandard
from train.data.prepare import input_files, read_documents
nothing = lambda _: None
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before = peak()
for name in sys.argv[1:]:
  (source,) = input_files.find_sources([name]).sources
  found = read_documents.read(
    source, read_documents.Fields(), nothing, nothing
  )
  problems = sum(isinstance(x, read_documents.Problem) for x in found)
  print(problems, peak() - before)
"""


def _zeros(size: int, window_log: int = 0) -> bytes:
  """Return zstd of a JSON line of `size` MiB, and of a good line."""
  options = dict(window_log=window_log) if window_log else {}
  parameters = zstandard.ZstdCompressionParameters.from_level(1, **options)
  compress = zstandard.ZstdCompressor(compression_params=parameters)
  writer, out = compress.compressobj(), io.BytesIO()
  out.write(writer.compress(b'{"text": "'))
  for _ in range(size):
    out.write(writer.compress(b"a" * _MIB))
  out.write(writer.compress(b'"}\n{"text": "good"}\n') + writer.flush())
  return out.getvalue()


def _repeated(value: str, count: int, path: Path, **options) -> None:
  """Write a Parquet file of one value repeated `count` times."""
  if "column_encoding" in options:
    texts = pa.array([value] * count)
  else:
    texts = pa.DictionaryArray.from_arrays([0] * count, [value])
  parquet.write_table(
    pa.table(dict(text=texts)),
    path,
    compression="zstd",
    store_schema=False,
    dictionary_pagesize_limit=1 << 30,
    **options,
  )


def test_small_files_do_not_take_much_memory(tmp_path):
  (tmp_path / "a.jsonl.zst").write_bytes(_zeros(512))
  (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"a" * (200 * _MIB)))
  _repeated("a" * (4 * _MIB), 256, tmp_path / "c.parquet")
  _repeated(
    *("a" * _MIB, 500, tmp_path / "d.parquet"),
    use_dictionary=False,
    column_encoding={"text": "DELTA_BYTE_ARRAY"},
  )
  names = sorted(str(x) for x in tmp_path.iterdir())
  assert sum(os.path.getsize(name) for name in names) < 300_000
  done = subprocess.run(
    [sys.executable, "-c", _MEASURE, *names],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  found = [line.split() for line in done.stdout.splitlines()]
  assert [int(x) for x, _ in found] == [1, 1, 0, 0]
  # The four files hold 0.5, 0.2, 1.0 and 0.5 GiB.
  assert max(int(x) for _, x in found) < 400, done.stdout


def test_a_large_window_is_refused_unless_documents_may_be_as_long(tmp_path):
  path = tmp_path / "x.jsonl.zst"
  path.write_bytes(_zeros(1, window_log=28))
  (problem,) = read(path)
  assert problem.reason == (
    "the zstd window near byte "
    f"{os.path.getsize(path)} of the file is above 128 MiB: raise "
    "--max-document-mb to its size, or compress without --long"
  )
  found = read(path, most_bytes=256 * _MIB)
  assert [len(x.text) for x in found] == [_MIB, 4]


def _chunk(path: Path, column: int = 0) -> object:
  return parquet.ParquetFile(path).metadata.row_group(0).column(column)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize(
  "encoding",
  ["dictionary", "PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"],
)
def test_the_largest_page_is_found(tmp_path, version, compression, encoding):
  path, texts = tmp_path / "x.parquet", [f"{i % 7}" * 5000 for i in range(40)]
  dictionary = encoding == "dictionary"
  parquet.write_table(
    pa.table(dict(text=texts)),
    path,
    compression=compression,
    data_page_version=version,
    use_dictionary=dictionary,
    column_encoding=None if dictionary else {"text": encoding},
  )
  chunk = _chunk(path)
  with path.open("rb") as file:
    size = largest_page(file, chunk)
  # All but the headers and, with a dictionary, its page of numbers.
  assert 0 < chunk.total_uncompressed_size - size < 300
  assert [x.text for x in read(path)] == texts


def test_a_page_header_of_deep_lists_is_refused():
  """Each byte 0x19 is a list that holds one list."""
  chunk = SimpleNamespace(
    num_values=1,
    data_page_offset=0,
    dictionary_page_offset=None,
    total_compressed_size=5000,
  )
  with pytest.raises(PageError, match="damaged page header at byte 0") as error:
    largest_page(io.BytesIO(b"\x19" * 5000), chunk)
  assert str(error.value.__cause__) == "too deeply nested"


def test_the_largest_of_many_pages_is_found(tmp_path):
  path = tmp_path / "x.parquet"
  texts = ["a" * (100_000 if i == 70 else 100) for i in range(100)]
  parquet.write_table(
    pa.table(dict(text=texts)),
    path,
    use_dictionary=False,
    compression="none",
    data_page_size=1,
    write_batch_size=1,
  )
  with path.open("rb") as file:
    assert 100_000 <= largest_page(file, _chunk(path)) < 100_100


def test_a_page_above_the_limit_is_refused_before_it_is_read(
  tmp_path, monkeypatch
):
  path = tmp_path / "x.parquet"
  path.write_bytes(parquet_bytes([dict(text="a" * 9000)] + records(3), 2))
  monkeypatch.setattr(read_documents, "_PAGE_BYTES", 8000)
  problem, *others = read(path, most_bytes=2000)
  assert problem.lost == 2 and "row 0 (row group 0)" in problem.where
  assert "expected at most 8,000; write smaller pages" in problem.reason
  assert [x.text for x in others] == [x["text"] for x in records(3)[1:]]


def test_a_damaged_page_header_is_named(tmp_path):
  path = tmp_path / "x.parquet"
  path.write_bytes(parquet_bytes(records(4)))
  chunk = parquet.ParquetFile(path).metadata.row_group(0).column(1)
  data = bytearray(path.read_bytes())
  for value in (b"\xff", b"\x00", b"\x1d", b"\x19\xfc\xff\xff\xff\x7f"):
    place = chunk.dictionary_page_offset
    data[place : place + len(value)] = value
    path.write_bytes(data)
    with path.open("rb") as file, pytest.raises(PageError, match="at byte"):
      largest_page(file, chunk)
  (problem,) = read(path)
  assert problem.lost == 4 and "damaged page header at byte" in problem.reason


def test_rows_of_long_values_are_read_a_few_at_a_time(tmp_path, monkeypatch):
  path, texts = tmp_path / "x.parquet", [f"{i}" * 700 for i in range(30)]
  path.write_bytes(parquet_bytes([dict(text=x) for x in texts], 11))
  for limit in (1, 20_000, 1 << 30):
    monkeypatch.setattr(read_documents, "_BATCH_BYTES", limit)
    assert [x.text for x in read(path)] == texts


@pytest.mark.parametrize(
  "table, fields, reason",
  [
    (
      pa.Table.from_arrays([["a"], ["b"]], ["text", "text"]),
      {},
      "the column 'text' is there more than once: expected one (--text-field)",
    ),
    (
      pa.Table.from_arrays([["a"], ["b"], ["c"]], ["text", "set", "set"]),
      dict(domain="set"),
      "the column 'set' is there more than once",
    ),
    (
      pa.Table.from_arrays(
        [["a"], [dict(b="c")], [dict(d="e")]], ["text", "m", "m"]
      ),
      dict(domain="m.b"),
      "the column 'm.b' is there more than once",
    ),
    (pa.table(dict(text=[["a"]])), {}, "text is no column of strings"),
    (pa.table(dict(text=[dict(b="a")])), {}, "text is no column of strings"),
    (
      pa.table(dict(text=pa.array([b"ab"], pa.binary(2)))),
      {},
      "text is no column of strings",
    ),
    (
      pa.table(dict(text=["a"], m=[dict(b=["c"])])),
      dict(domain="m.b"),
      "m.b is no column of strings (--domain-field)",
    ),
    (
      pa.table({"text": ["a"], "m": ["d" * 1025]}),
      dict(domain="m"),
      "m has 1,025 characters: expected the name of a data set",
    ),
  ],
)
def test_columns_that_hold_no_text_are_named(tmp_path, table, fields, reason):
  parquet.write_table(table, tmp_path / "x.parquet")
  (problem,) = read(tmp_path / "x.parquet", **fields)
  assert reason in problem.reason and problem.lost == 1


def test_other_columns_may_be_there_twice_or_be_absent(tmp_path):
  path = tmp_path / "x.parquet"
  for columns in (
    dict(text=["a"], m=["text"]),  # a column where the domain has a record
    dict(text=pa.array(["a"], pa.large_string()), m=[dict(b="c")]),
    dict(text=pa.array(["a"]).dictionary_encode(), m=[None]),
  ):
    parquet.write_table(pa.table(columns), path)
    (document,) = read(path, domain="m.b")
    assert isinstance(document, Document) and document.text == "a"
  table = pa.Table.from_arrays([["b"], ["a"], ["c"]], ["x", "text", "x"])
  parquet.write_table(table, path)
  assert [x.text for x in read(path)] == ["a"]


def test_long_names_of_fields_are_cut_in_messages(tmp_path):
  path = tmp_path / "x.jsonl"
  path.write_bytes(jsonl([{"b" * 10**6: 1}]))
  (problem,) = read(path)
  assert len(problem.reason) < 200
