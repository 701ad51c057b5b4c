"""Write small data sets in the formats that the trainer reads."""

from collections.abc import Sequence
import hashlib
import json
from pathlib import Path
import struct

from array_record.python.array_record_module import ArrayRecordWriter
import numpy as np

from train.data.prepare.tokenizer import ByteTokenizer

EOS = 256


def documents(
  count: int, *, seed: int = 0, most: int = 60, vocab_size: int = 256
) -> list[np.ndarray]:
  """Return documents of 0..most random tokens and an end of text, int64."""
  random = np.random.default_rng(seed)
  lengths = random.integers(0, most + 1, count)
  return [np.append(random.integers(0, vocab_size, n), EOS) for n in lengths]


def write_idx(
  path: Path,
  lengths: Sequence[int],
  *,
  starts: Sequence[int] | None = None,
  code: int = 8,
) -> None:
  """Write an index; by default each sequence is a document."""
  itemsize = {4: 4, 8: 2}[code]
  starts = range(len(lengths) + 1) if starts is None else starts
  offsets = np.concatenate([[0], np.cumsum(lengths)])[:-1] * itemsize
  path.write_bytes(
    b"MMIDIDX\x00\x00"
    + struct.pack("<QBQQ", 1, code, len(lengths), len(starts))
    + b"".join(struct.pack("<i", n) for n in lengths)
    + b"".join(struct.pack("<q", int(n)) for n in offsets)
    + b"".join(struct.pack("<q", n) for n in starts)
  )


def write_megatron(
  stem: Path,
  sequences: Sequence[np.ndarray],
  *,
  starts: Sequence[int] | None = None,
  code: int = 8,
  cuts: Sequence[int] | None = None,
) -> Path:
  """Write NAME.idx and NAME.bin, or NAME.bin cut at these bytes."""
  path = stem.with_name(stem.name + ".idx")
  write_idx(path, [len(x) for x in sequences], starts=starts, code=code)
  dtype = {4: "<i4", 8: "<u2"}[code]
  raw = np.concatenate(sequences).astype(dtype).tobytes()
  if cuts is None:
    stem.with_name(stem.name + ".bin").write_bytes(raw)
    return path
  bounds = [0, *cuts, len(raw)]
  for i in range(len(bounds) - 1):
    name = f"{stem.name}-{i:05}-of-{len(cuts):05}.bin"
    stem.with_name(name).write_bytes(raw[bounds[i] : bounds[i + 1]])
  return path


def write_prepared(
  folder: Path,
  shards: Sequence[Sequence[np.ndarray]],
  *,
  dtype: str = "uint16",
  vocab_size: int = EOS + 1,
  tokenizer: str = "bytes",
  domains: Sequence[str] = (),
) -> Path:
  """Write a prepared data set; document i has domain i modulo their number."""
  folder.mkdir(parents=True)
  entries, little = [], {"uint16": "<u2", "uint32": "<u4"}[dtype]
  for i, shard in enumerate(shards):
    path = folder / f"shard-{i:05}.arrayrecord"
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for document in shard:
      writer.write(np.asarray(document).astype(little).tobytes())
    writer.close()
    lengths = np.array([len(x) for x in shard], np.int64)
    np.save(path.with_suffix(".lengths.npy"), lengths)
    if domains:
      which = np.arange(len(shard)) % len(domains)
      np.save(path.with_suffix(".domains.npy"), which.astype(np.int16))
    entries.append(
      {
        "name": path.name,
        "input": {"name": f"{i}.jsonl"},
        "documents": len(shard),
        "tokens": int(lengths.sum()),
        "skipped": 0,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "domains": {
          name: {
            "documents": len(lengths[k :: len(domains)]),
            "tokens": int(lengths[k :: len(domains)].sum()),
          }
          for k, name in enumerate(sorted(domains))
        },
      }
    )
  known = {"bytes": ByteTokenizer().spec.sha256}
  other = hashlib.sha256(tokenizer.encode()).hexdigest()
  sidecar = {
    "format": "rebased-tokens",
    "version": 1,
    "kind": "documents",
    "dtype": dtype,
    "vocab_size": vocab_size,
    "tokenizer": {
      "name": tokenizer,
      "sha256": known.get(tokenizer, other),
    },
    "eos": EOS,
    "shards": entries,
    "domain_names": sorted(domains),
    "documents": sum(x["documents"] for x in entries),
    "tokens": sum(x["tokens"] for x in entries),
    "skipped": 0,
  }
  (folder / "dataset.json").write_text(json.dumps(sidecar))
  return folder
