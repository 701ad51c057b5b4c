"""Compile training steps for TPU slices that are not attached.

    JAX_PLATFORMS=cpu python benchmarks/scaling/run.py [--only NAME …] [--again]

Every figure comes from XLA's TPU compiler; nothing is run or measured. Each row
is one `rebased compile`, which needs `pip install libtpu` and one to ten
minutes. Rows are saved at once to `benchmarks/results/scaling.json`. A row that
is there is not compiled again, unless its options changed or --again is given.
`benchmarks/pages.py` writes the tables of `docs/scaling.md` from that file.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
from pathlib import Path
import re
import sys
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import environment  # noqa: E402

PATH = environment.RESULTS / "scaling.json"
_GIB = 2**30
_LONG = (
  "--model.positions None --data.length 1048576 --loss-chunks 64 --batch 4"
)


@dataclasses.dataclass(frozen=True)
class Case:
  """One call of `rebased compile`."""

  preset: str
  topology: str
  options: str

  @property
  def command(self) -> str:
    """The command line."""
    return (
      f"rebased compile {self.preset} --topology {self.topology} {self.options}"
    )


_157M, _360M, _1300M = (
  f"pile-{size}-rebased" for size in ("157m", "360m", "1.3b")
)
_157M_LONG = f"{_157M}-long"
CASES = {
  "157m-v5e16-none": Case(_157M, "v5e:4x4", "--mesh.fsdp 16 --accumulate 16"),
  "157m-v5e16-dots": Case(
    _157M, "v5e:4x4", "--mesh.fsdp 16 --accumulate 16 --model.remat dots"
  ),
  "157m-v5p16-data": Case(_157M, "v5p:2x2x4", "--accumulate 8"),
  "360m-v5e64-fsdp": Case(_360M, "v5e:8x8", "--mesh.fsdp 64 --accumulate 4"),
  "360m-v5e64-mix": Case(
    _360M, "v5e:8x8", "--mesh.data 4 --mesh.fsdp 16 --accumulate 4"
  ),
  "360m-v5p16-data": Case(_360M, "v5p:2x2x4", "--accumulate 8"),
  "1.3b-v5e64-fsdp": Case(_1300M, "v5e:8x8", "--mesh.fsdp 64 --accumulate 8"),
  "1.3b-v5e64-tp": Case(
    _1300M, "v5e:8x8", "--mesh.fsdp 16 --mesh.tensor 4 --accumulate 16"
  ),
  "1.3b-v5e256-fsdp": Case(
    _1300M, "v5e:16x16", "--mesh.fsdp 256 --accumulate 2"
  ),
  "1.3b-v5p16-fsdp": Case(_1300M, "v5p:2x2x4", "--mesh.fsdp 16 --accumulate 8"),
  "1.3b-v5p64-fsdp": Case(_1300M, "v5p:4x4x4", "--mesh.fsdp 64 --accumulate 2"),
  "1.3b-v5p64-tp": Case(
    _1300M, "v5p:4x4x4", "--mesh.fsdp 16 --mesh.tensor 4 --accumulate 8"
  ),
  "360m-32k-mix": Case(
    _360M,
    "v5e:8x8",
    "--model.positions None --data.length 32768 --loss-chunks 32 --batch 128 "
    "--mesh.fsdp 16 --mesh.context 4 --accumulate 8",
  ),
  "157m-1M-v5e16": Case(
    _157M_LONG, "v5e:4x4", f"--mesh.context 16 {_LONG} --accumulate 4"
  ),
  "157m-1M-v5e16-full": Case(
    _157M_LONG,
    "v5e:4x4",
    f"--mesh.context 16 {_LONG} --accumulate 4 --model.remat full",
  ),
  "157m-1M-v5e32": Case(
    _157M_LONG, "v5e:4x8", f"--mesh.context 32 {_LONG} --accumulate 4"
  ),
  "360m-1M-v5e64": Case(
    _360M,
    "v5e:8x8",
    f"--mesh.context 64 {_LONG} --accumulate 4",
  ),
  "1.3b-1M-v5e256": Case(
    _1300M,
    "v5e:16x16",
    f"--mesh.fsdp 4 --mesh.context 64 {_LONG} --accumulate 1",
  ),
  "1.3b-1M-v5e256-full": Case(
    _1300M,
    "v5e:16x16",
    f"--mesh.fsdp 4 --mesh.context 64 {_LONG} --accumulate 1 "
    "--model.remat full",
  ),
  "1.3b-1M-v5p64": Case(
    _1300M,
    "v5p:4x4x4",
    f"--mesh.fsdp 4 --mesh.context 16 {_LONG} --accumulate 1",
  ),
}


def config_of(case: Case) -> Any:
  """Return the config of the run that the command compiles."""
  from train.commands.compile import CompileArgs
  from train.presets import make_presets

  return tyro.cli(
    CompileArgs,
    args=case.options.split(),
    default=CompileArgs(make_presets()[case.preset]),
  ).run


def record(case: Case) -> dict[str, Any]:
  """Compile one case; return its settings and XLA's figures."""
  from train.compile import report
  from train.devices import mesh as mesh_lib

  config = config_of(case)
  mesh = mesh_lib.make_mesh(config.mesh, report.describe(case.topology))
  result = report.report(config, mesh)
  sizes = {name: n for name, n in mesh.shape.items() if n > 1}
  return {
    "command": case.command,
    "topology": case.topology,
    "preset": case.preset,
    "mesh": sizes,
    "rows": config.batch,
    "length": config.data.length,
    "accumulate": config.accumulate,
    "remat": config.model.remat,
    **dataclasses.asdict(result),
    "memory": result.found and result.found.memory,
    "fits": result.fits,
    "seconds": result.seconds,
    "seconds_moving": result.seconds_moving,
    "jax": importlib.metadata.version("jax"),
    "libtpu": importlib.metadata.version("libtpu"),
    "date": datetime.date.today().isoformat(),
  }


HEAD = (
  "| model | slice | mesh | rows × tokens | rows a device | remat | memory "
  "| PFLOP | all-gather | all-reduce | other | products | collectives |"
)


def tables(rows: dict[str, dict[str, Any]]) -> str:
  """Return two Markdown tables: rows of 4096 tokens, and longer rows."""
  found = []
  for title, inside in (
    ("Rows of 4096 tokens:", lambda x: x["length"] == 4096),
    ("Longer rows, without positions:", lambda x: x["length"] > 4096),
  ):
    lines = [title, "", HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
    lines += [_line(rows[x]) for x in CASES if x in rows and inside(rows[x])]
    found.append("\n".join(lines))
  return "\n\n".join(found) + "\n"


def _line(row: dict[str, Any]) -> str:
  mesh = " × ".join(f"{name} {n}" for name, n in row["mesh"].items())
  micro = row["rows"] // row["accumulate"]
  sharing = row["mesh"].get("data", 1) * row["mesh"].get("fsdp", 1)
  cells = [
    row["preset"].removeprefix("pile-").split("-")[0],
    row["topology"],
    mesh,
    f"{row['rows']} × {row['length']}",
    f"{micro // sharing} at a time",
    row["remat"],
  ]
  products = f"{row['products'] / 1e15:.2f}"
  if row["found"] is None:
    reason = f"does not fit: {_reason(row['reason'])}"
    return _joined([*cells, reason, products, *[""] * 3, _time(row), ""])
  memory = f"{row['memory'] / _GIB:.1f} GiB"
  if not row["fits"]:
    memory += ", does not fit"
  traffic = dict(row["found"]["traffic"])
  known = [traffic.pop(x, None) for x in ("all-gather", "all-reduce")]
  others = ", ".join(f"{kind} {_moved(x)}" for kind, x in traffic.items())
  moving = f"{row['seconds_moving']:.2f} s"
  return _joined(
    [*cells, memory, products, *map(_moved, known), others, _time(row), moving]
  )


def _joined(cells: list[str]) -> str:
  return "| " + " | ".join(cells) + " |"


def _time(row: dict[str, Any]) -> str:
  return f"{row['seconds']:.2f} s"


def _reason(text: str) -> str:
  """Return the sizes that XLA's message names."""
  numbers = re.findall(r"\(([\d.]+)G\)|HBM \(([\d.]+)G\)", text)
  needed, available = (a or b for a, b in numbers)
  return f"temporaries of {needed} GiB, {available} GiB are free"


def _moved(traffic: dict[str, Any] | None) -> str:
  if traffic is None:
    return ""
  return f"{traffic['times']:,}: {traffic['moved'] / _GIB:.1f} GiB"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
  parser.add_argument("--again", action="store_true")
  options = parser.parse_args()
  rows = json.loads(PATH.read_text()) if PATH.exists() else {}
  for name in options.only:
    known = rows.get(name, {}).get("command") == CASES[name].command
    if known and not options.again:
      continue
    print(CASES[name].command, flush=True)
    rows[name] = record(CASES[name])
    print("  memory:", rows[name]["memory"] or rows[name]["reason"], flush=True)
    PATH.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
  main()
