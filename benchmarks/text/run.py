"""Train ReBased, Based and attention on real text, at equal tokens.

    python benchmarks/text/run.py --seconds 540
    python benchmarks/text/run.py --systems rebased --tokens 150_000_000

The text comes from the Python installation, without a download, and is made as
`rebased experiment table-2` makes it. The script calls `rebased train`.
All systems see the same rows in the same order. Hyperparameters are the
paper's, except batch, length and number of steps. Loss curves and perplexities
of held-out documents are saved to --out when a system has finished.

Repeat the command to resume. A system that is in --out is not trained again,
and an interrupted one resumes from its run folder. A result with other settings
is refused. With --seconds, no system starts after that time, and a running one
is stopped and saved. On a CPU the models are tiny and the text is the standard
library only. The script needs tokenizers and matplotlib.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import jax
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.environment import RESULTS, ROOT, describe_in_child, python_path  # noqa: E402
from benchmarks.text import report  # noqa: E402
from train.experiments import language, record as records  # noqa: E402

PRESETS = {
  "attention": "pile-127m-attention",
  "based": "pile-145m-based",
  "rebased": "pile-145m-rebased",
}
# Exit codes of a trainer that was told to stop: after a save, or before.
_STOPPED = (143, -signal.SIGTERM, -signal.SIGKILL)
_GRACE = 90  # seconds that it has for its last save


@dataclasses.dataclass(frozen=True)
class Settings:
  """The settings that all systems of a result share."""

  size: str = "paper"  # the models' size: "paper" or "tiny"
  packages: bool = True  # use installed packages, not only the standard library
  corpus_mb: int = 320  # the most text, in MB
  sample_mb: int = 24  # the part of it that trains the tokenizer
  vocab_size: int = 16_384
  length: int = 2048  # tokens in a row
  batch: int = 16  # rows in a step
  tokens: int = 24_000_000  # training tokens of each system
  eval_rows: int = 256  # held-out rows
  evals: int = 8  # evaluations in a run
  seed: int = 0

  @property
  def steps(self) -> int:
    """The number of training steps."""
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
  """Return the command line of `rebased`."""
  return [sys.executable, "-m", "train", *words]


def train_command(preset: str, options: dict[str, Any]) -> list[str]:
  """Return the command line of a run; `options` are by name."""
  words = [x for k, v in options.items() for x in (f"--{k}", str(v))]
  return rebased("train", preset, *words)


def environment() -> dict[str, str]:
  """Return a child's variables: this checkout first, most of a GPU's memory."""
  memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
  return memory | os.environ | {"PYTHONPATH": python_path()}


def make_data(settings: Settings, folder: Path) -> dict[str, Any]:
  """Make text, tokenizer and tokens as Table 2 does; return their record.

  Args:
    settings: how much text.
    folder: gets the files, unless they are there.
  """
  names = ("packages", "corpus_mb", "sample_mb", "vocab_size")
  size = language.Size(**{name: getattr(settings, name) for name in names})
  try:
    return language.make_text(size, folder, Console())
  except records.RecordError as error:
    raise SystemExit(str(error)) from error


def train_options(name: str, settings: Settings, work: Path) -> dict[str, Any]:
  """Return the options in which a run differs from its preset."""
  steps = settings.steps
  options = {
    "run-dir": work / "runs" / name,
    "data.path": work / "data" / "tokens" / "train",
    "data.eval-path": work / "data" / "tokens" / "held-out",
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
  """Stop a trainer, which saves if it can; return its exit code."""
  process.send_signal(signal.SIGTERM)
  try:
    return process.wait(_GRACE)
  except subprocess.TimeoutExpired:  # it still compiles: nothing to save
    process.kill()
    return process.wait()


def train(
  name: str, settings: Settings, work: Path, deadline: float
) -> float | None:
  """Train a system.

  Returns:
    The seconds that it took; None if it was stopped at the deadline.
  """
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
  """Raise SystemExit if an earlier result has other settings or other text."""
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
  parser.add_argument("--tokens", type=int, help="training tokens per system")
  parser.add_argument("--corpus-mb", type=int)
  parser.add_argument("--seconds", type=float, default=float("inf"))
  parser.add_argument("--work", type=Path, default=ROOT / "runs" / "text")
  parser.add_argument("--out", type=Path, default=RESULTS / "text_run.json")
  return parser.parse_args()


def main() -> None:
  begin = time.monotonic()
  jax.config.update("jax_platforms", "cpu")  # children need the accelerator
  where = describe_in_child("train", "rebased_jax", "pallas_kernels")
  args = parse(where["device"] == "cpu")
  given = {"tokens": args.tokens, "corpus_mb": args.corpus_mb}
  settings = dataclasses.replace(
    TINY if args.model == "tiny" else PAPER,
    **{name: value for name, value in given.items() if value is not None},
  )
  args.work.mkdir(parents=True, exist_ok=True)
  corpus = make_data(settings, args.work / "data")
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
      print(f"{name}: out of time; repeat the command to resume")
      break
    folder = args.work / "runs" / name
    found = report.read(folder, PRESETS[name], where["device"])
    found["moment"] = {x: where[x] for x in ("date", "commit")}
    result["systems"][name] = found | {"seconds": round(seconds, 1)}
    report.write(result, args.out)
  print("\n".join(report.table(result)))


if __name__ == "__main__":
  main()
