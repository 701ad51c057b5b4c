"""Show the results of `run.py` as a Markdown table and as a plot."""

from pathlib import Path

_SYSTEMS = {
  "gpu": "`gpu`",
  "xla": "`xla`",
  "quadratic": "XLA quadratic",
  "cudnn": "cuDNN softmax",
  "fla parallel": "FLA parallel",
  "fla chunk": "FLA chunk",
  "copy": "copy",
}


def cell(row: dict, system: str) -> str:
  """Return "forward / both" in ms, or "–" if the system was not timed.

  A peer that ran on some rows of the batch is scaled to all rows, marked ~.
  """
  times = row.get(system)
  if times is None or "both_ms" not in times:
    return "–"
  scale, mark = 1.0, ""
  part = times.get("note", "").split(" of ")
  if len(part) == 2 and part[1].endswith(" rows"):
    scale, mark = row["B"] / int(part[0]), "~"
  pair = (times[f"{mode}_ms"] * scale for mode in ("forward", "both"))
  return " / ".join(f"{mark}{ms:.3g}" for ms in pair)


def table(result: dict) -> str:
  """Return a table with a line per shape and a column per timed system."""
  rows = result["rows"]
  used = [s for s in _SYSTEMS if any(cell(row, s) != "–" for row in rows)]
  lines = [
    "| ms, forward / with the backward | "
    + " | ".join(_SYSTEMS[s] for s in used)
    + " | of peak DRAM | of tensor peak |",
    "|---" * (len(used) + 3) + "|",
  ]
  for row in rows:
    shape = ", ".join(f"{n}={row[n]}" for n in "BTHP")
    cells = [cell(row, system) for system in used]
    peaks = [row["gpu"].get(f"{m}_peak", {}) for m in ("forward", "both")]
    for share in ("of_dram", "of_tensor"):
      found = [f"{p[share]:.0%}" if share in p else "–" for p in peaks]
      cells.append(" / ".join(found))
    lines.append(f"| {row['name']} ({shape}) | " + " | ".join(cells) + " |")
  return "\n".join(lines)


def plot(result: dict, path: Path) -> None:
  """Plot the time of both passes against T, at 65,536 tokens, log-log."""
  import matplotlib

  matplotlib.use("agg")
  from matplotlib import pyplot

  rows = [r for r in result["rows"] if r["name"].startswith("lm-")]
  rows = sorted(rows, key=lambda row: row["T"])
  figure, axes = pyplot.subplots(figsize=(6, 4))
  for system, label in _SYSTEMS.items():
    points = [
      (row["T"], float(cell(row, system).split(" / ")[1].lstrip("~")))
      for row in rows
      if cell(row, system) != "–"
    ]
    if points:
      axes.loglog(*zip(*points, strict=True), "o-", label=label.strip("`"))
  axes.set_xlabel("T, tokens in a row; 65,536 tokens in total")
  axes.set_ylabel("ms, forward and backward")
  axes.set_title(f"{result['device']}, bfloat16, H=12, F=16, P=64", fontsize=9)
  axes.grid(alpha=0.3, which="both")
  axes.legend(fontsize=8)
  figure.savefig(path, dpi=90, bbox_inches="tight")
  pyplot.close(figure)


def report(result: dict, path: Path) -> None:
  """Print the table and draw the plot beside the JSON file."""
  print(table(result))
  plot(result, path.with_suffix(".png"))
  print(f"\n{path.with_suffix('.png')}")
