"""Measure the text pipeline on the CPU, in tokens per second.

    python benchmarks/data/pipeline.py

Batches have 64 rows of 2,048 inputs, as the trainer takes them: shuffled,
int32, through grain with one thread. The files are made here: preshuffled rows
of 2,049 uint16 tokens in three raw shards, and documents of log-normal length
(median 545 tokens), as ArrayRecord and in Megatron's format. Batches are first
compared with rows cut from the documents in memory. A rate comes from the
median round, with the files in the page cache. The script exits with 1 if
values are wrong or a rate is below its target.
"""

import argparse
import json
import os
from pathlib import Path
import platform
import statistics
import sys
import tempfile
import time

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

from data_cases import write_megatron, write_prepared  # noqa: E402
import grain  # noqa: E402

from benchmarks.environment import RESULTS, moment  # noqa: E402
from train.data.prefetch import iterate  # noqa: E402
from train.data.text import packing as plans  # noqa: E402
from train.data.text.lm_batches import LMBatches  # noqa: E402
from train.data.text.rows import Layout  # noqa: E402

LENGTH, ROWS = 2048, 64
VOCAB = 50_277
TARGETS = {
  "Megatron rows": 15e6,
  "Megatron documents, stream": None,
  "ArrayRecord, stream": 12e6,
  "ArrayRecord, packed documents": 12e6,
  "plan, stream": 20e6,
  "plan, packed documents": 20e6,
}


def make_documents(tokens: int) -> list[np.ndarray]:
  """Make random documents with about `tokens` tokens in total."""
  random = np.random.default_rng(0)
  documents, total = [], 0
  while total < tokens:
    length = int(np.clip(random.lognormal(6.3, 1.2), 2, 200_000))
    document = random.integers(1, VOCAB, length, dtype=np.uint16)
    document[-1] = 0
    documents.append(document)
    total += length
  return documents


def make_batches(folder: Path, documents: list[np.ndarray]) -> dict:
  """Write the files; return batches from them, by the names in `TARGETS`."""
  stream = np.concatenate(documents)
  rows = stream[: len(stream) // (LENGTH + 1) * (LENGTH + 1)]
  rows = list(rows.reshape(-1, LENGTH + 1))
  third = rows[0].nbytes * len(rows) // 3
  cuts = (third, 2 * third)
  quarter = -(-len(documents) // 4)
  shards = [documents[i * quarter : (i + 1) * quarter] for i in range(4)]
  paths = {
    "rows": write_megatron(folder / "rows", rows, cuts=cuts),
    "documents": write_megatron(folder / "documents", documents, cuts=cuts),
    "set": write_prepared(folder / "set", shards, vocab_size=VOCAB),
  }

  def make(path: str, packing: str) -> LMBatches:
    layout = Layout(LENGTH, packing, validation=0.0)
    cache = folder / "plans"
    return LMBatches((str(paths[path]),), layout, ROWS, cache_dir=cache)

  return {
    "Megatron rows": make("rows", "rows"),
    "Megatron documents, stream": make("documents", "stream"),
    "ArrayRecord, stream": make("set", "stream"),
    "ArrayRecord, packed documents": make("set", "documents"),
  }


def check(name: str, batches: LMBatches, documents: list[np.ndarray]) -> None:
  """Raise SystemExit unless the first batches are rows of the documents."""
  stream = np.concatenate(documents)
  plan = batches.parts[0].plan
  for step in range(2):
    batch = batches[step]
    _, row_B = batches.locate(step * ROWS + np.arange(ROWS))
    for i, row in enumerate(row_B.tolist()):
      if batches.layout.packing == "documents":
        pieces, _ = plan.pieces(np.array([row]))
        parts = [
          documents[d][s : s + n] for d, s, n, _ in zip(*pieces, strict=True)
        ]
        want = np.concatenate(parts)
      else:
        stride = LENGTH + (batches.layout.packing == "rows")
        want = stream[row * stride : row * stride + LENGTH + 1]
      got = np.append(batch["tokens"][i], batch["targets"][i, -1])
      if not np.array_equal(got[: len(want)], want):
        raise SystemExit(f"{name}: step {step}, row {i} is wrong; not timed")


def pipeline(batches: LMBatches, steps: int) -> float:
  """Return the seconds of `steps` batches from grain, after two others."""
  with iterate(batches, start=0, stop=steps + 2) as data:
    for _ in range(2):
      next(data)
    start = time.perf_counter()
    for _ in range(steps):
      next(data)
    return time.perf_counter() - start


def planning(name: str, lengths: np.ndarray) -> float:
  """Return the seconds that planning rows takes, with the split."""
  make = plans.packed_plan if "packed" in name else plans.stream_plan
  start = time.perf_counter()
  chosen = plans.split_documents(len(lengths), "train", 0.01, 0.0)
  make(LENGTH + 1, lengths, chosen)
  return time.perf_counter() - start


def measure(batches: dict, steps: int, rounds: int) -> list[dict]:
  """Run everything in turn, several rounds, so a slow minute affects all."""
  random = np.random.default_rng(1)
  lengths = np.clip(random.lognormal(6.3, 1.2, 10**6), 2, 2e5).astype(np.int64)
  times: dict[str, list[float]] = {name: [] for name in TARGETS}
  for _ in range(rounds):
    for name, seconds in times.items():
      if name in batches:
        seconds.append(pipeline(batches[name], steps))
      else:
        seconds.append(planning(name, lengths))
  tokens = {name: steps * ROWS * LENGTH for name in batches}
  total = int(lengths.sum())
  return [
    {
      "name": name,
      "tokens_per_second": tokens.get(name, total)
      / statistics.median(times[name]),
      "best": tokens.get(name, total) / min(times[name]),
      "target": target,
      "rounds": rounds,
    }
    for name, target in TARGETS.items()
  ]


def setting() -> dict:
  return moment("train") | {
    "machine": platform.machine(),
    "cores": len(os.sched_getaffinity(0)),
    "versions": {
      "python": platform.python_version(),
      "numpy": np.__version__,
      "grain": grain.__version__,
    },
    "sizes": {"rows": ROWS, "length": LENGTH},
  }


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--tokens", type=int, default=100_000_000)
  parser.add_argument("--steps", type=int, default=150)
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--note", default="", help="the state of the machine")
  parser.add_argument("--output", type=Path, default=RESULTS / "data.json")
  args = parser.parse_args()
  documents = make_documents(args.tokens)
  with tempfile.TemporaryDirectory() as folder:
    batches = make_batches(Path(folder), documents)
    for name, source in batches.items():
      check(name, source, documents)
    load = [os.getloadavg()[0]]
    rows = measure(batches, args.steps, args.rounds)
    load.append(os.getloadavg()[0])
  met = all(r["tokens_per_second"] >= (r["target"] or 0) for r in rows)
  for row in rows:
    target = f"{row['target'] / 1e6:.0f}" if row["target"] else "–"
    print(
      f"{row['name']:32}{row['tokens_per_second'] / 1e6:>10.1f} M tokens/s"
      f"{row['best'] / 1e6:>10.1f} best   target {target}"
    )
  print(f"load before and after: {load[0]:.1f}, {load[1]:.1f}")
  result = setting() | {
    "load_before_and_after": load,
    "note": args.note,
    "targets_met": met,
    "rows": rows,
  }
  args.output.write_text(json.dumps(result, indent=2) + "\n")
  return 0 if met else 1


if __name__ == "__main__":
  sys.exit(main())
