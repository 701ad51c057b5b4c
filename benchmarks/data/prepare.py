"""Measure how much of the tokenizer's own speed `rebased prepare` keeps.

    python benchmarks/data/prepare.py

The text is the Python standard library, twice, as JSON lines. The tokenizer is
a BPE with 8192 tokens, trained on it. `bare` is `encode_batch_fast` alone, the
fastest call of `tokenizers`, on documents in memory and one thread. `prepare`
is one shard from file to files: reading, parsing, checking, tokenising,
compressing, hashing. Seconds are processor time of all threads, so other work
on the machine does not count. Runs alternate, the medians count, and the tokens
are compared before a rate is given. The script exits with 1 below 80 %.
"""

import json
import os
from pathlib import Path
import statistics
import sys
import tempfile
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from array_record.python.array_record_module import ArrayRecordReader  # noqa: E402
import numpy as np  # noqa: E402
import tokenizers  # noqa: E402

from train.data.prepare import (  # noqa: E402
  input_files,
  read_documents,
  shard,
  tokenizer as tokenize,
)
from train.data.prepare.input_files import Source  # noqa: E402
from train.data.prepare.tokenizer import Tokenizer  # noqa: E402

COPIES, RUNS, VOCABULARY, LEAST = 2, 5, 8192, 0.8


def corpus() -> list[str]:
  """Return the documents of the standard library."""
  nothing = lambda _: None
  return [
    found.text
    for source in input_files.find_sources((), "stdlib").sources
    for found in read_documents.read(
      source, read_documents.Fields(), nothing, nothing
    )
    if isinstance(found, read_documents.Document) and found.text
  ]


def one_shard(source: Source, tokenizer: Tokenizer, out: Path) -> float:
  """Return the processor seconds of making one shard."""
  job = shard.Job(0, source, str(out), read_documents.Fields())
  begin = time.process_time()
  shard.write_shard(job, tokenizer, lambda _: None, lambda: False)
  return time.process_time() - begin


def prepare_rates() -> dict[str, float]:
  """Measure MB of text per processor second, and the share that is kept.

  Raises:
    AssertionError: a shard does not hold the bare tokenizer's tokens.
  """
  texts = corpus() * COPIES
  size = sum(len(value.encode()) for value in texts) / 1e6
  rates: dict[str, float] = dict(megabytes=size)
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    (folder / "out" / "prepare").mkdir(parents=True)
    file = folder / "read_documents.jsonl"
    lines = (json.dumps(dict(text=value)) + "\n" for value in texts)
    file.write_text("".join(lines))
    (folder / "bpe.json").write_text(tokenize.train_bpe(texts, VOCABULARY))
    (source,) = input_files.find_sources([str(file)]).sources
    tokenizer = tokenize.load(str(folder / "bpe.json"))
    bare = tokenizers.Tokenizer.from_file(str(folder / "bpe.json"))
    bare.encode_special_tokens = True
    times: dict[str, list[float]] = dict(bare=[], prepare=[])
    for _ in range(RUNS):
      begin = time.process_time()
      found = bare.encode_batch_fast(texts, add_special_tokens=False)
      times["bare"].append(time.process_time() - begin)
      times["prepare"].append(one_shard(source, tokenizer, folder / "out"))
      _check([x.ids for x in found], folder / "out")
      del found
    seconds = one_shard(source, tokenize.load("bytes"), folder / "out")
    rates["prepare_bytes"] = size / seconds
  for key, values in times.items():
    rates[key] = size / statistics.median(values)
  rates["share"] = rates["prepare"] / rates["bare"]
  return rates


def _check(expected: list[list[int]], out: Path) -> None:
  reader = ArrayRecordReader(str(out / "shard-00000.arrayrecord"))
  found = reader.read_all()
  reader.close()
  assert len(found) == len(expected)
  for record, ids in zip(found, expected, strict=True):
    assert np.frombuffer(record, "<u2").tolist() == [*ids, 0]


def main() -> None:
  rates = prepare_rates()
  print(json.dumps({key: round(value, 3) for key, value in rates.items()}))
  sys.exit(rates["share"] < LEAST)


if __name__ == "__main__":
  main()
