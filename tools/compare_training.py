"""Train presets with the Hopper kernels and with "xla", and compare losses.

    python tools/compare_training.py [--cases mqar lm] [--work FOLDER]

Each case is trained by `rebased train` in bfloat16, with the same number of
seeds for "gpu" and for "xla". The distance of two runs is the mean of |a − b|
over their logged losses. The kernels pass if the mean distance between a "gpu"
run and an "xla" run is at most the largest distance of two runs of one kind.
The language model trains on the Python standard library. The result, with
curves, is saved to benchmarks/results/gpu_training.json, beside other cases in
that file. The script exits with 1 if a case fails. It needs tokenizers.
"""

import argparse
from concurrent import futures
import dataclasses
import itertools
import json
from pathlib import Path
import statistics
import sys
from typing import Any, NamedTuple

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.environment import RESULTS, ROOT, describe_in_child  # noqa: E402
from benchmarks.text import run as text_run  # noqa: E402
from train.records.run_folder import RunFolder  # noqa: E402

IMPLEMENTATIONS = ("gpu", "xla")
TEXT = dataclasses.replace(text_run.TINY, corpus_mb=24, vocab_size=8192)
_SHORT = {"log-every": 10, "save-every": 10_000, "keep": 1}
_MQAR = {"steps": 600, "eval-every": 600, "stop-accuracy": None}


class Case(NamedTuple):
  """A preset, its changed options, and the number of seeds of each kind."""

  preset: str
  options: dict[str, Any]
  seeds: int


CASES = {
  "mqar": Case("mqar", _MQAR, 4),
  "mqar-5": Case("mqar", _MQAR | {"model.second.heads": 12}, 4),  # P = 5
  "lm": Case(
    "pile-145m-rebased",
    {
      "steps": 200,
      "eval-every": 200,
      "batch": 8,
      "accumulate": 1,
      "data.length": 2048,
      "data.validation": 0.02,
      "data.eval-rows": 32,
      "model.positions": 2048,
      "model.vocab-size": TEXT.vocab_size,
      "optimizer.warmup-steps": 20,
    },
    2,
  ),
}


def distance(a: list[float], b: list[float]) -> float:
  """Return the mean |a − b| of two runs' logged losses.

  Raises:
    ValueError: the runs have different numbers of losses.
  """
  return statistics.fmean(abs(x - y) for x, y in zip(a, b, strict=True))


def judge(losses: dict[str, list[list[float]]]) -> dict[str, Any]:
  """Judge whether two implementations differ by more than seeds do.

  Args:
    losses: the runs of each implementation, each a list of losses.
  """
  gpu, xla = (losses[name] for name in IMPLEMENTATIONS)
  between = [distance(a, b) for a, b in itertools.product(gpu, xla)]
  within = [
    distance(a, b)
    for runs in (gpu, xla)
    for a, b in itertools.combinations(runs, 2)
  ]
  mean = statistics.fmean
  return {
    "between": round(mean(between), 5),
    "within": [round(x, 5) for x in (mean(within), max(within))],
    "learned": all(run[-1] < 0.9 * run[0] for run in gpu),
    "within_noise": mean(between) <= max(within),
  }


def train(preset: str, options: dict[str, Any], run: Path) -> list[dict]:
  """Train a run and return its records; raise SystemExit if it fails."""
  text_run.call(*text_run.train_command(preset, {"run-dir": run} | options))
  return RunFolder(run).read_metrics()


def run_case(name: str, work: Path, jobs: int) -> dict[str, Any]:
  """Train the runs of a case, `jobs` at a time; return curves and verdict."""
  preset, options, seeds = CASES[name]
  options = _SHORT | {"model.dtype": "bfloat16"} | options
  recorded = {k: str(v) for k, v in options.items()}
  if name == "lm":
    text_run.make_data(TEXT, work)
    options |= {"data.path": work / "tokens" / "train"}

  def run(implementation: str, seed: int) -> list[dict]:
    chosen = {"model.second.implementation": implementation, "seed": seed}
    folder = work / f"{name}-{implementation}-{seed}"
    return train(preset, options | chosen, folder)

  which = list(itertools.product(IMPLEMENTATIONS, range(seeds)))
  with futures.ThreadPoolExecutor(jobs) as pool:
    found = list(pool.map(lambda x: run(*x), which))
  losses, ends = {}, {}
  for (implementation, _), records in zip(which, found, strict=True):
    steps = [x for x in records if x["kind"] == "train"]
    curve = [round(x["loss"], 5) for x in steps]
    losses.setdefault(implementation, []).append(curve)
    held_out = [x for x in records if x["kind"] == "eval"][-1]
    end = [round(held_out[k], 4) for k in ("loss", "accuracy")]
    ends.setdefault(implementation, []).append(end)
  return {
    "preset": preset,
    "options": recorded,
    **judge(losses),
    "held_out_loss_and_accuracy": ends,
    "step": [x["step"] for x in steps],
    "losses": losses,
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
  work = ROOT / "runs" / "gpu_training"
  parser.add_argument("--work", type=Path, default=work)
  parser.add_argument(
    "--jobs", type=int, default=1, help="runs at the same time"
  )
  args = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")  # children need the accelerator
  where = describe_in_child("train", "rebased_jax", "pallas_kernels")
  if "NVIDIA" not in where["device"]:
    sys.exit(f"this tool needs an NVIDIA GPU; the device is {where['device']}")
  args.work.mkdir(parents=True, exist_ok=True)
  out = RESULTS / "gpu_training.json"
  result = json.loads(out.read_text()) if out.exists() else {"cases": {}}
  for name in args.cases:
    row = run_case(name, args.work, args.jobs)
    result["cases"][name] = where | row
    shown = ("between", "within", "learned", "within_noise")
    print(name, {key: row[key] for key in shown}, flush=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
  ran = [result["cases"][name] for name in args.cases]
  if not all(x["within_noise"] and x["learned"] for x in ran):
    sys.exit(1)


if __name__ == "__main__":
  main()
