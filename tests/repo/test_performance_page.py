"""The tables of docs/performance.md are those of benchmarks/results."""

import json
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_RESULTS = _ROOT / "benchmarks" / "results"


def _number(ms: float | None) -> str:
  if ms is None:
    return "–"
  return f"{ms:,.0f}" if ms >= 1000 else f"{ms:.3g}"


def _times(row: dict, peer: str) -> str:
  """Return forward time / time with the backward; ~ marks scaled-up ones."""
  times = row.get(peer, {})
  if "forward_ms" not in times:
    return "–"
  scale, mark = 1.0, ""
  if peer == "quadratic" and "note" in times:  # "5 of 16 rows" were timed
    measured, _, rows, _ = times["note"].split()
    scale, mark = int(rows) / int(measured), "~"
  return " / ".join(
    mark + _number(scale * times[name]) for name in ("forward_ms", "both_ms")
  )


def _table(header: list[str], rows: list[list[str]]) -> str:
  lines = [header, ["---"] * len(header), *rows]
  return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def _operator(record: str) -> str:
  rows = []
  for row in json.loads((_RESULTS / record).read_text())["rows"]:
    sizes = [str(row[letter]) for letter in "BTHFP"]
    peers = ("gpu", "xla", "quadratic", "fla parallel", "cudnn", "copy")
    times = [_times(row, peer) for peer in peers]
    rows.append([row["name"], ", ".join(sizes), *times])
  header = ["case", "B, T, H, F, P", "`gpu`", "`xla`", "XLA, quadratic"]
  return _table([*header, "FLA, parallel", "cuDNN softmax", "copy"], rows)


def _mixers() -> str:
  rows = json.loads((_RESULTS / "mixers_gpu.json").read_text())["rows"]
  lengths = (512, 2048, 8192, 32768)
  systems = list(dict.fromkeys(row["system"] for row in rows))
  table = []
  for system in systems:
    own = {row["T"]: row for row in rows if row["system"] == system}
    cells = [
      f"{_number(own[T]['forward']['ms'])} / {_number(own[T]['both']['ms'])}"
      for T in lengths
    ]
    table.append([system, *cells])
  return _table(["layer", *(f"T = {T}" for T in lengths)], table)


def _steps(record: str) -> str:
  data = json.loads((_RESULTS / record).read_text())
  table = []
  for row in [*data["rows"], *data["peers"]]:
    by = "PyTorch" if "peer" in row else "here"
    mfu = f"{100 * row['mfu']:.1f} %"
    tokens = f"{row['tokens_per_second']:,.0f}"
    batch = f"{row['rows']} × {row['length']}"
    table.append([row["case"], by, batch, tokens, mfu])
  header = ["model", "step by", "rows × tokens", "tokens/s", "MFU (6 N)"]
  return _table(header, table)


def _cpu() -> str:
  rows = json.loads((_RESULTS / "attention_cpu.json").read_text())["rows"]
  of = {(row["form"], row["mode"], row["T"]): row["seconds"] for row in rows}
  table = []
  for T in sorted({row["T"] for row in rows}):
    cells = []
    for form in ("linear", "quadratic"):
      modes = ("forward", "forward+backward")
      times = [of.get((form, mode, T)) for mode in modes]
      ms = [None if time is None else 1000 * time for time in times]
      cells.append(" / ".join(map(_number, ms)))
    table.append([str(T), *cells])
  return _table(["T", "`xla`, linear", "quadratic"], table)


TABLES = {
  "operator on an H200": lambda: _operator("kernels_h200.json"),
  "operator on an H100": lambda: _operator("kernels.json"),
  "layers on an H100": _mixers,
  "training step on an H200": lambda: _steps("train_step_h200.json"),
  "training step on an H100": lambda: _steps("train_step_gpu.json"),
  "operator on a CPU": _cpu,
}


@pytest.mark.parametrize("name", TABLES)
def test_table_is_that_of_the_record(name: str) -> None:
  page = (_ROOT / "docs" / "performance.md").read_text()
  table = TABLES[name]()
  assert table in page, f"docs/performance.md should have\n{table}"
