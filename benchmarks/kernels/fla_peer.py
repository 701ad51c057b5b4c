"""Measure ReBased of flash-linear-attention (FLA), a PyTorch library.

`run.py` starts this script in a separate process, with a folder that holds the
inputs and float32 results of a few rows. The script prints a line of JSON for
each shape and mode:

    parallel   `parallel_rebased`, quadratic in T
    chunk      features written to memory, then `chunk_linear_attn`, linear in T

Values are checked first, and wrong values get no time. CUDA events around a
series of calls give the time of one call. The median of several series counts.
"""

import itertools
import json
from pathlib import Path
import sys

from fla.modules.feature_map import flatten_diag_outer_product_off1
from fla.ops.linear_attn import chunk_linear_attn
from fla.ops.rebased import parallel_rebased
import numpy as np
import torch

# The largest ‖a − b‖ / ‖b‖ after the first 64 tokens. FLA rounds denominators,
# or the sums they come from, to bfloat16, and divides in bfloat16.
TOLERANCE = 5e-2
FIRST = 64


def parallel(q, k, v):
  return parallel_rebased(q, k, v, eps=1e-6)


def chunk(q, k, v):
  """Use φ(x) = (x_i², √2 x_i x_j for i < j) / √F, as FLA's layer does."""

  def expand(x):
    off, diagonal = flatten_diag_outer_product_off1(x, x)
    width = x.shape[-1]
    parts = [diagonal * width**-0.5, off * (2 / width) ** 0.5]
    return torch.cat(parts, dim=-1)

  o, _ = chunk_linear_attn(expand(q), expand(k), v, scale=1, normalize=True)
  return o


MODES = {"parallel": parallel, "chunk": chunk}


def both(call, q, k, v, do):
  o = call(q, k, v)
  return o, *torch.autograd.grad(o, (q, k, v), do)


def load(path: Path):
  """Return q, k, v, do in bfloat16, and o, dq, dk, dv in float32."""
  data = np.load(path)
  low = [
    torch.from_numpy(data[n].view(np.int16)).cuda().view(torch.bfloat16)
    for n in ("q", "k", "v", "do")
  ]
  wide = [torch.from_numpy(data[n]).cuda() for n in ("o", "dq", "dk", "dv")]
  return low, wide


def errors(call, path: Path) -> dict[str, float]:
  (q, k, v, do), expected = load(path)
  q, k, v = (x.requires_grad_() for x in (q, k, v))
  found = [x.detach().float() for x in both(call, q, k, v, do)]
  # The first tokens of o are not compared. Their do is 0 in the inputs.
  found[0], expected[0] = found[0][:, FIRST:], expected[0][:, FIRST:]
  names = ("o", "dq", "dk", "dv")
  return {
    name: float((a - b).norm() / b.norm())
    for name, a, b in zip(names, found, expected, strict=True)
  }


def milliseconds(call, budget: float = 300.0, runs: int = 9) -> float:
  """Return the median time of a call; `budget` is in milliseconds too."""

  def once(calls):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
      call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls

  once(2)
  first = once(1)
  calls = max(1, min(100, int(20 / first)))
  runs = max(3, min(runs, int(budget / (calls * first))))
  return float(np.median([once(calls) for _ in range(runs)]))


def measure(mode: str, sizes: dict, path: Path) -> dict:
  call = MODES[mode]
  found = errors(call, path)
  if not all(error <= TOLERANCE for error in found.values()):
    return {"skipped": f"wrong values: {found}"}
  B, T, H, F, P = (sizes[name] for name in "BTHFP")
  make = lambda width: torch.randn(
    B, T, H, width, device="cuda", dtype=torch.bfloat16
  )
  q, k, v, do = (make(width) for width in (F, F, P, P))
  q, k, v = (x.requires_grad_() for x in (q, k, v))

  def forward():
    with torch.no_grad():
      return call(q, k, v)

  return {
    "errors": found,
    "forward_ms": milliseconds(forward),
    "both_ms": milliseconds(lambda: both(call, q, k, v, do)),
  }


def main() -> None:
  folder = Path(sys.argv[1])
  shapes = json.loads((folder / "sizes.json").read_text())
  # "chunk" comes last because its tuning takes minutes.
  for mode, sizes in itertools.product(MODES, shapes):
    row = {"name": sizes["name"], "mode": mode}
    try:
      row |= measure(mode, sizes, folder / f"{sizes['name']}.npz")
    except (RuntimeError, ValueError, AssertionError) as error:
      # Errors of PyTorch and Triton are among these. Other shapes may work.
      reason = str(error).strip().splitlines() or [type(error).__name__]
      row["skipped"] = reason[0][:300]
    torch.cuda.empty_cache()
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
  main()
