"""Report the rows of `run.py`: a table, verdicts and a plot."""

from pathlib import Path

LINEAR = 1.3  # the most that a linear cost may grow, shortest to longest row
NEAR = 1.1  # the most that ReBased may take of Based's time
FROM = 2048  # the smallest T of the verdicts that compare systems


def table(rows: list[dict]) -> list[str]:
  """Return the lines of a table; "both" means forward and backward."""
  lines = [
    f"{'system':11}{'T':>6}{'forward ms':>12}{'both ms':>10}"
    f"{'forward MiB':>13}{'both MiB':>10}{'error':>9}  kernel"
  ]
  for row in sorted(rows, key=lambda row: (row["system"], row["T"])):
    forward, both = row["forward"], row["both"]
    lines.append(
      f"{row['system']:11}{row['T']:>6}{forward['ms']:>12.3f}"
      f"{both['ms']:>10.3f}{forward['bytes'] / 2**20:>13.1f}"
      f"{both['bytes'] / 2**20:>10.1f}{row['worst_error']:>9.0e}  "
      f"{row['kernel']}"
    )
  return lines


def verdicts(rows: list[dict]) -> list[dict]:
  """Judge whether costs are linear in T, and how ReBased compares."""
  found = []
  by_system: dict[str, dict[int, dict]] = {}
  for row in rows:
    by_system.setdefault(row["system"], {})[row["T"]] = row
  for name, by_length in by_system.items():
    first, last = (by_length[pick(by_length)] for pick in (min, max))
    if name == "Attention" or first is last:
      continue
    for what, field in (("time", "ms"), ("memory", "bytes")):
      if (name, what) == ("Hyena", "time"):
        continue  # its Fourier transforms take T log T
      ratio = last["both"][field] / first["both"][field]
      line = f"{name}: {what} of as many tokens, T = {first['T']} to "
      line += f"{last['T']}: {ratio:.2f}, at most {LINEAR}"
      found.append({"passed": ratio <= LINEAR, "line": line})
  ours = by_system.get("ReBased", {})
  for name, by_length in by_system.items():
    lengths = sorted(T for T in ours.keys() & by_length.keys() if T >= FROM)
    if name in ("ReBased", "BaseConv") or not lengths:
      continue
    for mode in ("forward", "both"):
      limit = NEAR if name == "Based" else 1.0
      ratios = [ours[T][mode]["ms"] / by_length[T][mode]["ms"] for T in lengths]
      shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
      line = f"ReBased's time, {mode}, of {name}'s at T = "
      line += f"{', '.join(map(str, lengths))}: {shown}, at most {limit}"
      found.append({"passed": max(ratios) <= limit, "line": line})
  return found


def plot(result: dict, source: Path) -> None:
  """Draw the plot of a result beside its JSON file."""
  from matplotlib import figure

  drawing = figure.Figure(figsize=(9, 6.5), layout="constrained")
  sizes, panels = result["sizes"], drawing.subplots(2, 2, sharex=True)
  titles = {"forward": "forward", "both": "forward and backward"}
  rows = sorted(result["rows"], key=lambda row: row["T"])
  names = list(dict.fromkeys(row["system"] for row in result["rows"]))
  for column, mode in enumerate(titles):
    fields = (("ms", 1, "milliseconds"), ("bytes", 2**-20, "MiB"))
    for line, (field, unit, label) in enumerate(fields):
      panel = panels[line][column]
      for name in names:
        points = [
          (row["T"], row[mode][field] * unit)
          for row in rows
          if row["system"] == name
        ]
        panel.loglog(*zip(*points, strict=True), "o-", label=name, ms=4)
      panel.set_ylabel(label)
      panel.grid(alpha=0.3)
    panels[0][column].set_title(titles[mode])
    lengths = sorted({row["T"] for row in rows})
    panels[1][column].set_xticks(lengths, map(str, lengths))
    panels[1][column].minorticks_off()
    panels[1][column].set_xlabel("T")
  lines, labels = panels[0][0].get_legend_handles_labels()
  drawing.legend(lines, labels, loc="outside lower center", ncols=len(names))
  drawing.suptitle(
    f"One layer, D = {sizes['width']}, {sizes['tokens']:,} tokens in rows of T,"
    f" {sizes['dtype']}, {result['device']}"
  )
  drawing.savefig(source.with_suffix(".png"), dpi=90)
