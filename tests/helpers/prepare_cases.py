"""Write text in every raw format, and read what `prepare` made."""

import gzip
import io
import json
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader
import numpy as np
import pyarrow as pa
from pyarrow import parquet
from rich.console import Console
import zstandard

from train.data.file_hashes import file_hash
from train.data.prepare import (
  input_files,
  prepare_dataset,
  read_documents,
  tokenizer as tokenize,
)
from train.data.prepare.prepare_dataset import PrepareConfig

DOMAINS = ("Wikipedia (en)", "ArXiv", "Github")


def records(count: int, first: int = 0) -> list[dict]:
  """Return records like those of the Pile, of one to four lines."""
  return [
    dict(
      text="\n".join(f"déjà {i} vu 日本 {i * j}" for j in range(1 + i % 4)),
      meta=dict(pile_set_name=DOMAINS[i % 3]),
    )
    for i in range(first, first + count)
  ]


def jsonl(values: list) -> bytes:
  return "".join(json.dumps(value) + "\n" for value in values).encode()


def zst(data: bytes, frames: int = 1) -> bytes:
  size = -(-len(data) // frames)
  compress = zstandard.ZstdCompressor().compress
  return b"".join(
    compress(data[i : i + size]) for i in range(0, len(data), size)
  )


def parquet_bytes(values: list[dict], group: int = 7) -> bytes:
  out = io.BytesIO()
  parquet.write_table(pa.Table.from_pylist(values), out, row_group_size=group)
  return out.getvalue()


def write_formats(folder: Path, count: int = 20) -> dict[str, list[dict]]:
  """Write one file of each format; return the records of each."""
  folder.mkdir()
  data = {
    name: records(count, i * count)
    for i, name in enumerate(
      ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet")
    )
  }
  (folder / "a.jsonl").write_bytes(jsonl(data["a.jsonl"]))
  (folder / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(data["b.jsonl.gz"])))
  (folder / "c.jsonl.zst").write_bytes(zst(jsonl(data["c.jsonl.zst"]), 3))
  (folder / "d.parquet").write_bytes(parquet_bytes(data["d.parquet"]))
  return data


def quiet() -> Console:
  return Console(file=io.StringIO())


def run(inputs: list, out: Path, **options) -> dict | None:
  config = PrepareConfig(str(out), workers=1, **options)
  return prepare_dataset.prepare(config, [str(x) for x in inputs], quiet())


def tree(folder: Path) -> dict[str, bytes]:
  """Return the content of every file of a folder, by name."""
  return {
    path.relative_to(folder).as_posix(): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


def shard_texts(out: Path) -> list[list[str]]:
  """Return the texts of each shard, after checking all its files."""
  dataset = json.loads((out / "dataset.json").read_text())
  assert dataset["format"] == "rebased-tokens"
  assert (dataset["version"], dataset["kind"]) == (1, "documents")
  kind = dataset["tokenizer"]["type"]
  tokenizer = tokenize.load("bytes" if kind == "bytes" else str(out))
  assert tokenizer.spec.sha256 == dataset["tokenizer"]["sha256"]
  assert tokenizer.spec.vocab_size == dataset["vocab_size"]
  found = []
  for shard in dataset["shards"]:
    path = out / shard["name"]
    assert file_hash(path) == shard["sha256"]
    reader = ArrayRecordReader(str(path))
    assert reader.num_records() == shard["documents"]
    raw = reader.read_all() if shard["documents"] else []
    reader.close()
    rows = [np.frombuffer(x, dataset["dtype"]) for x in raw]
    lengths = np.load(path.with_suffix(".lengths.npy"))
    assert lengths.dtype == np.int64
    assert lengths.tolist() == [len(row) for row in rows]
    assert shard["tokens"] == lengths.sum()
    if dataset["eos"] is not None:
      assert all(row[-1] == dataset["eos"] for row in rows)
      rows = [row[:-1] for row in rows]
    texts = [tokenizer.decode(row) for row in rows]
    assert shard["text_bytes"] == sum(len(x.encode()) for x in texts)
    found.append(texts)
  for name in ("documents", "tokens", "skipped", "empty", "text_bytes"):
    assert dataset[name] == sum(shard[name] for shard in dataset["shards"])
  return found


def read(
  path: Path, **fields
) -> list[read_documents.Document | read_documents.Problem]:
  """Return the documents and problems of a file."""
  (source,) = input_files.find_sources([str(path)]).sources
  nothing = lambda _: None
  return list(
    read_documents.read(
      source, read_documents.Fields(**fields), nothing, nothing
    )
  )
