"""A run of ReBased, Based and attention over real text, at equal tokens.

    python benchmarks/text_run.py --seconds 540
    python benchmarks/text_run.py --systems rebased --tokens 150_000_000

The text is what lies beside Python, see text_corpus.py; nothing is fetched. A
BPE is learnt from a part of it, and `rebased tokenizer train`, `prepare` and
`train` do the rest: the same rows in the same order, the paper's hyper-
parameters but for the batch, the length and the number of steps. Curves and
perplexities of held-out documents go to --out as each system ends. The same
command goes on: a system that is in --out is not trained again, one that was
stopped goes on from its run folder, and what has other settings is refused.

With --seconds, no system starts that has no time, and one that is under way is
stopped and saved. On a CPU the models are tiny and the text is the standard
library alone. Needs tokenizers and matplotlib.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from environment import RESULTS, ROOT, describe_apart
import jax
import text_corpus
import text_run_report

PRESETS = {
  "attention": "pile-127m-attention",
  "based": "pile-145m-based",
  "rebased": "pile-145m-rebased",
}
# Codes of a trainer that was told to stop: saved, or not yet under way.
_STOPPED = (143, -signal.SIGTERM, -signal.SIGKILL)
_GRACE = 90  # seconds for its last save


@dataclasses.dataclass(frozen=True)
class Settings:
  """What all systems of a result share."""

  size: str = "paper"  # of the models, or "tiny"
  packages: bool = True  # text beyond the standard library
  corpus_mb: int = 320  # of text at most
  sample_mb: int = 24  # of it for the tokenizer
  vocab_size: int = 16_384
  length: int = 2048  # of a row
  batch: int = 16  # rows
  tokens: int = 24_000_000  # of training, for each system
  eval_rows: int = 256  # held out
  evals: int = 8  # in a run
  seed: int = 0

  @property
  def steps(self) -> int:
    return max(self.tokens // (self.length * self.batch), 10)


PAPER = Settings()
TINY = Settings(
  size="tiny",
  packages=False,
  corpus_mb=2,
  sample_mb=1,
  vocab_size=512,
  length=128,
  batch=8,
  tokens=40_960,
  eval_rows=32,
  evals=4,
)


def rebased(*words: str) -> list[str]:
  """The command line of `rebased`."""
  return [sys.executable, "-m", "train", *words]


def train_command(preset: str, options: dict[str, Any]) -> list[str]:
  """The command line of a run, of options by name."""
  words = [x for k, v in options.items() for x in (f"--{k}", str(v))]
  return rebased("train", preset, *words)


def environment() -> dict[str, str]:
  """Of a child: this repository first, and most of a GPU's memory."""
  path = os.pathsep.join(filter(None, (str(ROOT), os.getenv("PYTHONPATH"))))
  memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
  return memory | os.environ | {"PYTHONPATH": path}


def call(*words: str) -> None:
  """Runs a command to its end; SystemExit where it fails."""
  done = subprocess.run(words, env=environment(), check=False)
  if done.returncode:
    raise SystemExit(f"exit code {done.returncode}: {' '.join(words)}")


def make_data(settings: Settings, work: Path) -> dict[str, Any]:
  """The corpus, its tokenizer and its tokens in `work`; the corpus' record."""
  record = work / "corpus.json"
  names = ("packages", "corpus_mb", "sample_mb", "vocab_size")
  made_by = {name: getattr(settings, name) for name in names}
  if record.exists():
    found = json.loads(record.read_text())
    if found["made_by"] != made_by:
      raise SystemExit(
        f"{record}: made by {found['made_by']}: expected {made_by}; choose "
        "another --work"
      )
    return found
  begin = time.perf_counter()
  documents = text_corpus.gather(settings.packages, settings.corpus_mb << 20)
  shutil.rmtree(work / "text", ignore_errors=True)
  text_corpus.write(documents, work / "text", 2 * (os.cpu_count() or 1))
  tokenizer = work / "tokenizer.json"
  tokenizer.unlink(missing_ok=True)
  sizes = ("--vocab-size", str(settings.vocab_size))
  sample = ("--sample-mb", str(settings.sample_mb))
  learn = ("tokenizer", "train", str(work / "text" / "train"))
  call(*rebased(*learn, "--out", str(tokenizer), *sizes, *sample))
  named = ("--tokenizer", str(tokenizer))
  for part in ("train", "held-out"):
    out = work / "tokens" / part
    text = str(work / "text" / part)
    call(*rebased("prepare", text, "--out", str(out), *named))
  found = {"made_by": made_by, **text_corpus.describe(documents)}
  for part in ("train", "held-out"):
    made = json.loads((work / "tokens" / part / "dataset.json").read_text())
    counts = ("documents", "tokens", "text_bytes")
    found[part] = {name: made[name] for name in counts}
  found["tokenizer_sha256"] = made["tokenizer"]["sha256"]
  found["seconds"] = round(time.perf_counter() - begin, 1)
  record.write_text(json.dumps(found, indent=1) + "\n")
  return found


def train_options(name: str, settings: Settings, work: Path) -> dict[str, Any]:
  """What a system's preset has otherwise, by option."""
  steps = settings.steps
  options = {
    "run-dir": work / "runs" / name,
    "data.path": work / "tokens" / "train",
    "data.eval-path": work / "tokens" / "held-out",
    "data.validation": 0,
    "data.length": settings.length,
    "data.eval-rows": settings.eval_rows,
    "data.cache-dir": work / "plans",
    "model.vocab-size": settings.vocab_size,
    "model.positions": settings.length,
    "steps": steps,
    "batch": settings.batch,
    "accumulate": 1,
    "optimizer.warmup-steps": min(200, steps // 5),
    "eval-every": max(steps // settings.evals, 1),
    "save-every": max(steps // 2, 1),
    "log-every": max(steps // 64, 1),
    "keep": 1,
    "seed": settings.seed,
  }
  if settings.size == "tiny":
    options |= {
      "model.width": 64,
      "model.pairs": 1,
      "model.mlp-width": 128,
      "model.second.heads": 4,
      "model.dtype": "float32",
      "loss-chunks": 1,
    }
    if name == "attention":
      options["model.first.heads"] = 4
  return options


def stop(process: subprocess.Popen) -> int:
  """Ends a trainer, which saves if it can; its exit code."""
  process.send_signal(signal.SIGTERM)
  try:
    return process.wait(_GRACE)
  except subprocess.TimeoutExpired:  # it compiles, and has nothing to save
    process.kill()
    return process.wait()


def train(
  name: str, settings: Settings, work: Path, deadline: float
) -> float | None:
  """Trains a system; seconds of it here, None where it was stopped."""
  if time.monotonic() >= deadline:
    return None
  options = train_options(name, settings, work)
  begin = time.perf_counter()
  process = subprocess.Popen(
    train_command(PRESETS[name], options), env=environment()
  )
  try:
    code = process.wait(min(deadline - time.monotonic(), threading.TIMEOUT_MAX))
  except subprocess.TimeoutExpired:
    code = stop(process)
    if code in _STOPPED:
      return None
  if code:
    raise SystemExit(f"{name}: exit code {code}")
  return time.perf_counter() - begin


def check_same(old: dict[str, Any], new: dict[str, Any], out: Path) -> None:
  """Raises SystemExit where a result is of other settings or text."""
  flat = lambda x: {
    **x["settings"],
    "device": x["device"],
    "corpus": x["corpus"]["sha256"],
    "tokenizer": x["corpus"]["tokenizer_sha256"],
  }
  before, now = flat(old), flat(new)
  changed = [
    f"{k}: {before.get(k)!r} → {v!r}"
    for k, v in now.items()
    if before.get(k) != v
  ]
  if changed:
    raise SystemExit(
      f"{out} is of another run: {'; '.join(changed)}; choose another --out"
    )


def parse(on_cpu: bool) -> argparse.Namespace:
  defaults = TINY if on_cpu else PAPER
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "--systems", nargs="+", choices=list(PRESETS), default=list(PRESETS)
  )
  parser.add_argument(
    "--model", choices=("tiny", "paper"), default=defaults.size
  )
  parser.add_argument("--tokens", type=int, help="of each system")
  parser.add_argument("--corpus-mb", type=int)
  parser.add_argument("--seconds", type=float, default=float("inf"))
  parser.add_argument("--work", type=Path, default=ROOT / "runs" / "text")
  parser.add_argument("--out", type=Path, default=RESULTS / "text_run.json")
  return parser.parse_args()


def main() -> None:
  begin = time.monotonic()
  jax.config.update("jax_platforms", "cpu")  # the device is for the children
  where = describe_apart("train", "rebased_jax", "pallas_kernels")
  args = parse(where["device"] == "cpu")
  given = {"tokens": args.tokens, "corpus_mb": args.corpus_mb}
  settings = dataclasses.replace(
    TINY if args.model == "tiny" else PAPER,
    **{name: value for name, value in given.items() if value is not None},
  )
  args.work.mkdir(parents=True, exist_ok=True)
  corpus = make_data(settings, args.work)
  result = {**where, "settings": dataclasses.asdict(settings), "corpus": corpus}
  result["systems"] = {}
  if args.out.exists():
    old = json.loads(args.out.read_text())
    check_same(old, result, args.out)
    result["systems"] = old["systems"]
  print(
    f"text: {corpus['bytes'] / 1e6:.0f} MB, {time.monotonic() - begin:.0f} s"
  )
  for name in args.systems:
    if name in result["systems"]:
      continue
    seconds = train(name, settings, args.work, begin + args.seconds)
    if seconds is None:
      print(f"{name}: out of time; the same command goes on")
      break
    folder = args.work / "runs" / name
    found = text_run_report.read(folder, PRESETS[name], where["device"])
    found["moment"] = {x: where[x] for x in ("date", "commit")}
    result["systems"][name] = found | {"seconds": round(seconds, 1)}
    text_run_report.write(result, args.out)
  print("\n".join(text_run_report.table(result)))


if __name__ == "__main__":
  main()
