"""Measure single kernels on the device, and read ptxas's report on them."""

from pathlib import Path
import re
import statistics

import jax

from benchmarks.kernels import floors

_ITERATIONS = 7


def kernels(compiled, arrays, wall_ms: float, spec) -> dict:
  """Return the milliseconds of each kernel of a call by CUPTI, and their sum.

  The times are dropped, with the reason, if CUPTI cannot be used. They are also
  dropped if their sum is over 110 % or under half of the call's wall time.
  """
  try:
    # Imported here, because jax may move this experimental module.
    from jax.experimental.mosaic.gpu import profiler

    _, runs = profiler.Cupti().measure(
      compiled, aggregate=False, iterations=_ITERATIONS
    )(*arrays)
  except (ImportError, AttributeError, RuntimeError) as error:
    return {"dropped": f"CUPTI: {str(error)[:200]}"}
  if not runs:
    return {"dropped": "CUPTI saw no kernel"}
  each: dict[str, float] = {}
  for i, (name, _) in enumerate(runs[0]):
    ms = statistics.median(run[i][1] for run in runs)
    each[name] = each.get(name, 0.0) + ms
  total = sum(each.values())
  if not 0.5 * wall_ms <= total <= 1.1 * wall_ms:
    return {
      "dropped": f"the kernels' {total:.3f} ms do not fit the wall time of "
      f"{wall_ms:.3f} ms"
    }
  return {"sum_ms": round(total, 4), "each": _named(each, spec)}


def _named(each: dict[str, float], spec) -> dict:
  """Return each kernel's time, with its floors if `floors` knows the kernel."""
  device = jax.devices()[0].device_kind
  work = floors.kernels(spec)
  result = {}
  for name, ms in each.items():
    result[name] = {"ms": round(ms, 4)}
    known = [kind for kind in work if f"polynomial_{kind}" in name]
    if known:
      kind = max(known, key=len)
      result[name] |= floors.shares(work[kind], ms, device)
  return result


def registers(folder: Path) -> list[dict]:
  """Return the distinct rows of all ptxas reports (*.ptxas) in a folder."""
  found = []
  for path in sorted(folder.rglob("*.ptxas")):
    for row in parse_ptxas(path.read_text(errors="replace")):
      if row not in found:
        found.append(row)
  return sorted(found, key=lambda row: row["kernel"])


def parse_ptxas(text: str) -> list[dict]:
  """Return each kernel's registers and spilled bytes from ptxas's output."""
  rows, name, spills = [], "unknown", (0, 0)
  for line in text.splitlines():
    if match := re.search(r"Compiling entry function '([^']+)'", line):
      name, spills = match[1], (0, 0)
    elif match := re.search(
      r"(\d+) bytes spill stores, (\d+) bytes spill loads", line
    ):
      spills = int(match[1]), int(match[2])
    elif match := re.search(r"Used (\d+) registers", line):
      stores, loads = spills
      rows.append(
        {
          "kernel": name,
          "registers": int(match[1]),
          "spill_store_bytes": stores,
          "spill_load_bytes": loads,
        }
      )
  return rows
