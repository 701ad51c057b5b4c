"""The results of text_run.py: what a run's records say, table and picture."""

import json
from pathlib import Path
import statistics
import sys
from typing import Any

from environment import ROOT

sys.path.insert(0, str(ROOT))

from rebased_jax import parameter_count  # noqa: E402
from train import build
from train.devices import peaks
from train.records.run_folder import RunFolder

LABEL = (
  "A small run over Python sources and documents, to compare the systems at "
  "equal tokens, rows and order; the text is not the Pile, and 1 seed is 1 "
  "sample. Held out are whole files: other files of the same packages, some of "
  "them near copies, are trained on. AR: the bigram stood in the row before."
)
MODELS = {
  "paper": "Attention is Table 9's; Based and ReBased have H = 12, F = 16, as "
  "the paper's text says; vocabulary and length are other ones.",
  "tiny": "The models are tiny, to try the script.",
}
_COMPILED = 3  # times the median: no step of a steady run takes that
_HELD_OUT = (
  *("loss", "perplexity", "ar_perplexity", "non_ar_perplexity"),
  *("ar_share", "accuracy"),
)


def read(path: Path, preset: str, device: str) -> dict[str, Any]:
  """A finished run's curves and final values.

  `seconds` of a point are those of steps, evaluation and compilation left out:
  a window that holds the latter, first of all or after a resume, counts at the
  median rate.
  """
  folder = RunFolder(path)
  config, records = folder.read_config(), folder.read_metrics()
  train = [x for x in records if x["kind"] == "train"]
  held_out = [x for x in records if x["kind"] == "eval"]
  row = config.batch * config.data.length
  pace = statistics.median(x["step_time"] for x in train)
  seconds, step, curve, at = 0.0, 0, [], {0: 0.0}
  for x in train:
    compiled = step == 0 or x["step_time"] > _COMPILED * pace
    taken = pace if compiled else x["step_time"]
    seconds += taken * (x["step"] - step)
    step = x["step"]
    at[step] = seconds
    curve.append([step * row, round(seconds, 2), round(x["loss"], 4)])
  count = parameter_count(build.abstract_model(config))
  rate = row / pace
  mfu = peaks.mfu(rate, count, device, 1)
  return {
    "preset": preset,
    "parameters": count,
    "tokens": step * row,
    "tokens_per_second": round(rate),
    "mfu": mfu and round(mfu, 4),
    "train": {"columns": ["tokens", "seconds", "loss"], "rows": curve},
    "held_out": {
      "columns": ["tokens", *_HELD_OUT],
      "rows": [
        [x["step"] * row, *(round(x[name], 4) for name in _HELD_OUT)]
        for x in held_out
      ],
    },
    "final": {name: round(held_out[-1][name], 4) for name in _HELD_OUT},
  }


def write(result: dict[str, Any], out: Path) -> None:
  """The JSON, whole or not at all, and the picture beside it."""
  out.parent.mkdir(parents=True, exist_ok=True)
  temporary = out.with_suffix(".tmp")
  models = MODELS[result["settings"]["size"]]
  value = {"label": LABEL, "models": models, **result}
  temporary.write_text(json.dumps(value, indent=1) + "\n")
  temporary.replace(out)
  plot(value, out.with_suffix(".png"))


def table(result: dict[str, Any]) -> list[str]:
  lines = [
    "system      parameters  M tokens  tokens/s  "
    "perplexity     AR  non-AR  AR %"
  ]
  for name, x in result["systems"].items():
    end = x["final"]
    lines.append(
      f"{name:<10} {x['parameters']:>11,}  {x['tokens'] / 1e6:>8.2f}  "
      f"{x['tokens_per_second']:>8,}  {end['perplexity']:>10.3f}  "
      f"{end['ar_perplexity']:>5.2f}  {end['non_ar_perplexity']:>6.1f}  "
      f"{100 * end['ar_share']:>4.1f}"
    )
  return lines


def plot(result: dict[str, Any], path: Path) -> None:
  """Training loss and held-out loss against tokens, and against seconds."""
  from matplotlib import figure

  drawing = figure.Figure(figsize=(9, 4), layout="constrained")
  left, right = drawing.subplots(1, 2)
  for name, x in result["systems"].items():
    tokens, seconds, loss = zip(*x["train"]["rows"], strict=True)
    (line,) = left.plot([t / 1e6 for t in tokens], loss, alpha=0.4, lw=1)
    held_out = [row[:2] for row in x["held_out"]["rows"]]
    places, losses = zip(*held_out, strict=True)
    color = line.get_color()
    places = [t / 1e6 for t in places]
    left.plot(places, losses, "o-", color=color, ms=3, label=name)
    right.plot(seconds, loss, color=color, lw=1, label=name)
  left.set(xlabel="million tokens", ylabel="loss")
  left.set_title("held out (dots) and training")
  right.set(xlabel="seconds of training steps", ylabel="training loss")
  for panel in (left, right):
    panel.grid(alpha=0.3)
    panel.legend()
  corpus = result["corpus"]
  drawing.suptitle(
    f"{corpus['bytes'] / 1e6:.0f} MB of Python sources and documents, "
    f"{result['device']}"
  )
  drawing.savefig(path, dpi=90)
