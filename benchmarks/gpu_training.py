"""Trains presets through the GPU kernels and through "xla", side by side.

    python benchmarks/gpu_training.py [--cases mqar lm] [--work FOLDER]

Three runs of each case by `rebased train`, in bfloat16: "gpu" and "xla" of one
seed, and "xla" of another seed. The distance of two runs is the mean of |a − b|
over their logged losses. The kernels pass where their run is as near to "xla"
of the same seed, same batches and same start, as "xla" is to itself of another
seed. The text of the language model is the standard library's. The record, with
curves, goes to results/gpu_training.json; exits 1 if a case did not pass.
Needs tokenizers.
"""

import argparse
import dataclasses
import json
from pathlib import Path
import statistics
import sys
from typing import Any

from environment import RESULTS, ROOT, describe_apart
import jax
import text_run

sys.path.insert(0, str(ROOT))

from train.run_folder import RunFolder  # noqa: E402

RUNS = (("gpu", 0), ("xla", 0), ("xla", 1))  # implementation, seed
TEXT = dataclasses.replace(text_run.TINY, corpus_mb=24, vocab_size=8192)
_SHORT = {"log-every": 10, "save-every": 10_000, "keep": 1}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
  "mqar": ("mqar", {"steps": 600, "eval-every": 600, "stop-accuracy": None}),
  "mqar-paper": (
    "mqar-paper-rebased-256",
    {"steps": 392, "eval-every": 392},
  ),
  "lm": (
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
  ),
}


def distance(a: list[float], b: list[float]) -> float:
  """Of two runs' logged losses; ValueError where they are not as many."""
  return statistics.fmean(abs(x - y) for x, y in zip(a, b, strict=True))


def judge(losses: dict[str, list[float]]) -> dict[str, Any]:
  """Whether the kernels' run is within what a seed does."""
  gpu, xla, other = (losses[f"{name}, seed {seed}"] for name, seed in RUNS)
  found, noise = distance(gpu, xla), distance(xla, other)
  return {
    "gpu_to_xla": round(found, 5),
    "seed_to_seed": round(noise, 5),
    "learned": gpu[-1] < 0.9 * gpu[0],
    "within_noise": found <= noise,
  }


def train(preset: str, options: dict[str, Any], run: Path) -> list[dict]:
  """A run's records; SystemExit where it fails."""
  words = [x for k, v in options.items() for x in (f"--{k}", str(v))]
  text_run.call(
    *text_run.rebased("train", preset, "--run-dir", str(run), *words)
  )
  return RunFolder(run).read_metrics()


def run_case(name: str, work: Path) -> dict[str, Any]:
  """The runs of a case, their curves and the verdict."""
  preset, options = CASES[name]
  options = _SHORT | {"model.dtype": "bfloat16"} | options
  if name == "lm":
    text_run.make_data(TEXT, work)
    options |= {"data.path": work / "tokens" / "train"}
  losses, ends = {}, {}
  for implementation, seed in RUNS:
    key = f"{implementation}, seed {seed}"
    chosen = {"model.mixer.implementation": implementation, "seed": seed}
    folder = work / f"{name}-{implementation}-{seed}"
    records = train(preset, options | chosen, folder)
    train_records = [x for x in records if x["kind"] == "train"]
    losses[key] = [round(x["loss"], 5) for x in train_records]
    held_out = [x for x in records if x["kind"] == "eval"][-1]
    ends[key] = {k: round(held_out[k], 4) for k in ("loss", "accuracy")}
  return {
    "preset": preset,
    "options": {k: str(v) for k, v in options.items() if k != "data.path"},
    **judge(losses),
    "held_out": ends,
    "step": [x["step"] for x in train_records],
    "losses": losses,
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
  work = ROOT / "runs" / "gpu_training"
  parser.add_argument("--work", type=Path, default=work)
  args = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")  # the device is for the children
  result = describe_apart("train", "rebased_jax", "pallas_kernels")
  if "NVIDIA" not in result["device"]:
    sys.exit(f"gpu_training needs an NVIDIA GPU: this is {result['device']}")
  args.work.mkdir(parents=True, exist_ok=True)
  out = RESULTS / "gpu_training.json"
  result["cases"] = {}
  for name in args.cases:
    row = result["cases"][name] = run_case(name, args.work)
    shown = ("gpu_to_xla", "seed_to_seed", "learned", "within_noise")
    print(name, {key: row[key] for key in shown}, row["held_out"], flush=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
  if not all(
    x["within_noise"] and x["learned"] for x in result["cases"].values()
  ):
    sys.exit(1)


if __name__ == "__main__":
  main()
