"""Turn the records of finished runs into a result, a table and a plot."""

from pathlib import Path
import statistics
from typing import Any

import jax

from rebased_jax import atomic, parameter_count
from train import compiled_steps
from train.devices import peaks
from train.records.run_folder import RunFolder

LABEL = (
  "A small run on Python sources and documents, which compares the systems at "
  "equal tokens, rows and order. The text is not the Pile, and one seed is one "
  "sample. Whole files are held out, but other files of the same packages, "
  "some nearly identical, are in the training text. AR: the bigram occurred "
  "earlier in the row."
)
MODELS = {
  "paper": "Attention is the model of the paper's Table 9. Based and ReBased "
  "have H = 12 and F = 16, as the paper's text says. Vocabulary and length "
  "differ from the paper.",
  "tiny": "The models are tiny and only show that the script works.",
}
_COMPILED = 3  # a step slower than this many medians included a compilation
_HELD_OUT = (
  *("loss", "perplexity", "ar_perplexity", "non_ar_perplexity"),
  *("ar_share", "accuracy"),
)


def read(path: Path, preset: str, device: str) -> dict[str, Any]:
  """Return a finished run's curves and final values.

  The `seconds` of a point count training steps, without evaluation and
  compilation. A window that includes a compilation, as the first one does,
  counts at the median rate.
  """
  folder = RunFolder(path)
  config, records = folder.read_config(), folder.read_metrics()
  train = [x for x in records if x["kind"] == "train"]
  held_out = [x for x in records if x["kind"] == "eval"]
  row = config.batch * config.data.length
  pace = statistics.median(x["step_seconds"] for x in train)
  seconds, step, curve, at = 0.0, 0, [], {0: 0.0}
  for x in train:
    compiled = step == 0 or x["step_seconds"] > _COMPILED * pace
    taken = pace if compiled else x["step_seconds"]
    seconds += taken * (x["step"] - step)
    step = x["step"]
    at[step] = seconds
    curve.append([step * row, round(seconds, 2), round(x["loss"], 4)])
  count = parameter_count(compiled_steps.abstract_model(config))
  rate = row / pace
  gpu = jax.sharding.AbstractDevice(device, None, "gpu")
  mfu = peaks.mfu(rate, count, gpu, 1)
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
  """Write the JSON file atomically, and draw the plot beside it."""
  out.parent.mkdir(parents=True, exist_ok=True)
  models = MODELS[result["settings"]["size"]]
  value = {"label": LABEL, "models": models, **result}
  atomic.write_json(out, value)
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
  """Plot losses against tokens, and the training loss against seconds."""
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
