"""Device times of single kernels, and what ptxas says of them."""

from pathlib import Path
import re
import statistics

import jax
import kernels_floor

_ITERATIONS = 7


def kernels(compiled, arrays, wall_ms: float, spec) -> dict:
  """Milliseconds of each kernel of a call by CUPTI, and their sum.

  Dropped, with the reason, where CUPTI cannot be used, or where the sum does
  not fit the wall time of the same call: more than it, or less than half.
  """
  try:
    # Not at the top: jax keeps it among what may change.
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
    return {"dropped": f"{total:.3f} ms do not fit {wall_ms:.3f} of wall time"}
  return {"sum_ms": round(total, 4), "each": _named(each, spec)}


def _named(each: dict[str, float], spec) -> dict:
  """With floors and shares, for those that `kernels_floor` knows."""
  device = jax.devices()[0].device_kind
  work = kernels_floor.kernels(spec)
  result = {}
  for name, ms in each.items():
    result[name] = {"ms": round(ms, 4)}
    known = [kind for kind in work if f"polynomial_{kind}" in name]
    if known:
      kind = max(known, key=len)
      result[name] |= kernels_floor.shares(work[kind], ms, device)
  return result


def registers(folder: Path) -> list[dict]:
  """What ptxas wrote into *.ptxas, each different line of it once."""
  found = []
  for path in sorted(folder.rglob("*.ptxas")):
    for row in parse_ptxas(path.read_text(errors="replace")):
      if row not in found:
        found.append(row)
  return sorted(found, key=lambda row: row["kernel"])


def parse_ptxas(text: str) -> list[dict]:
  """Registers and spilled bytes of each kernel in ptxas's verbose output."""
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
