"""Read the TPU compiler's schedule of the kernels, without a TPU.

    JAX_PLATFORMS=cpu python tools/tpu_schedule.py [--sweep] [--write]

libtpu compiles for v5e, v5p and v6e on any machine and dumps its final
schedule. A TPU issues one bundle per cycle if nothing waits. Waits for HBM and
for late results are not in the figures. A kernel's figure is the number of all
bundles in its program, those of the grid included, divided by the tokens and
heads of one span. The program holds one span; a loop over several spans would
spread the bundles of the grid over more tokens.

--sweep tries other sizes and reports the best. --write saves the sizes and the
figures to `benchmarks/results/tpu_schedule.json`. If the best sizes are not
those of `pallas_kernels/polynomial/tpu/sizes.py`, write them there: a test
compares the two.
"""

import argparse
import datetime
import glob
import importlib.metadata
import itertools
import json
import os
from pathlib import Path
import re
import tempfile
from unittest import mock

DUMP = tempfile.mkdtemp(prefix="llo_")
os.environ["LIBTPU_INIT_ARGS"] = " ".join(
  [
    os.environ.get("LIBTPU_INIT_ARGS", ""),
    f"--xla_jf_dump_to={DUMP} --xla_jf_dump_llo_text=true",
  ]
)

import jax  # noqa: E402
from jax import ShapeDtypeStruct  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec  # noqa: E402
import numpy as np  # noqa: E402

from pallas_kernels import REBASED, devices, polynomial_attention, zero_state  # noqa: E402
from pallas_kernels.polynomial import xla as xla_chunked  # noqa: E402
from pallas_kernels.polynomial.operator import Kernel  # noqa: E402
from pallas_kernels.polynomial.tpu import passes, sizes as tpu_sizes  # noqa: E402

CAPTION = (
  "Static figures of the TPU compiler's schedule, not measured times; one "
  "bundle is one cycle if nothing waits."
)
GENERATIONS = ("v5e", "v5p", "v6e")
KERNELS = ("forward", "backward_queries", "backward_keys")
# Public peak rates of a chip: HBM bytes and bfloat16 FLOP per nanosecond.
PEAKS = {"v5e": (819, 197e3), "v5p": (2765, 459e3), "v6e": (1640, 918e3)}
B, T, H, P = 1, 4096, 12, 64
ROOT = Path(__file__).parents[1]


def functions(F: int) -> dict:
  """Return (function, arguments) of each kernel, and of "xla"."""
  kernel = Kernel(REBASED.scaled(F**-0.5), 1e-6)
  array = lambda width: ShapeDtypeStruct((B, T, H, width), jnp.bfloat16)
  q, v = array(F), array(P)
  one = lambda x: ShapeDtypeStruct(
    (B, xla_chunked.CHUNKS.chunk, *x.shape[2:]), x.dtype
  )
  state = jax.eval_shape(lambda: zero_state(B, H, F, P))
  row = ShapeDtypeStruct((B, H, 1, T), jnp.float32)

  def forward(q, k, v):
    return passes.forward(q, k, v, None, None, kernel, return_state=False)[0]

  def backward_queries(q, k, v, do):
    return passes.backward_queries(q, k, v, do, None, None, kernel)

  def backward_keys(q, k, v, do, r, dz):
    return passes.backward_keys(
      q, k, v, do, r, dz, None, None, kernel, return_state=False
    )[:2]

  def xla(q, k, v, state, do):
    call = lambda *x: polynomial_attention(
      *x[:3], initial_state=x[3], return_state=True, implementation="xla"
    )
    out, vjp = jax.vjp(call, q, k, v, state)
    return out, vjp((do, state))

  return dict(
    forward=(forward, (q, q, v)),
    backward_queries=(backward_queries, (q, q, v, v)),
    backward_keys=(backward_keys, (q, q, v, v, row, row)),
    xla=(xla, (*(one(x) for x in (q, q, v)), state, one(v))),
  )


def compiled(generation: str, function, arrays):
  """Compile a function; the dump then holds this program only."""
  for path in glob.glob(f"{DUMP}/*"):
    os.remove(path)
  mesh = Mesh(
    np.array(devices.tpu_topology(generation)[:1]),
    ("x",),
    axis_types=(AxisType.Auto,),
  )
  place = NamedSharding(mesh, PartitionSpec())
  arrays = jax.tree.map(
    lambda x: ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arrays
  )
  with jax.set_mesh(mesh):
    return jax.jit(function).lower(*arrays).compile()


def _dumped(ending: str) -> str:
  (path,) = glob.glob(f"{DUMP}/*polynomial_*-{ending}.txt")
  return Path(path).read_text()


def schedule(generation: str, kernel: str, F: int) -> dict:
  """Return the figures of one kernel at the sizes of `tpu/sizes.py`."""
  compiled(generation, *functions(F)[kernel])
  with jax.set_mesh(_no_devices(generation)):
    chunk, span, block = tpu_sizes.sizes_for(kernel, F, T)
  total = _dumped("*schedule-analysis_final_bundles")
  bundles = int(re.search(r"total scheduled bundles:\s*(\d+)", total)[1])
  lines = _dumped("*final_hlo-static-per-bundle-utilization").splitlines()
  names = [name.strip() for name in lines[1].split(",")]
  capacity = np.array(lines[2].split(), int)
  used = np.array([line.split() for line in lines[4:]], int).sum(axis=0)
  least = dict(zip(names, used / capacity, strict=True))
  unit = max(least, key=least.get)
  vmem = re.findall(
    r"space=vmem, size = (0x[0-9a-f]+)", _dumped("*02-original")
  )
  return dict(
    chunk=chunk,
    span=span,
    block=block,
    bundles_per_token_head=round(bundles / span, 3),
    fullest_unit=unit,
    its_bundles_per_token_head=round(float(least[unit]) / span, 3),
    spill_stores_per_token_head=round(
      float(used[names.index("VSTORE:SPILL")]) / span, 3
    ),
    vmem_kib=sum(int(size, 16) for size in vmem) // 1024,
  )


def _no_devices(generation: str) -> Mesh:
  return Mesh(np.array(devices.tpu_topology(generation)[:1]), ("x",))


def sweep(generation: str, kernel: str, F: int) -> dict:
  """Return the figures of one kernel at the best of several sizes."""
  spans = {8: (1024,), 16: (512, 1024, 2048), 32: (256, 512), 64: (256,)}
  found = []
  for chunk, span in itertools.product((128, 256), spans[F]):
    sizes = tpu_sizes.Sizes(chunk, span, block=max(2048, 2 * span))
    with mock.patch.object(tpu_sizes, "best_sizes", return_value=sizes):
      found.append(schedule(generation, kernel, F))
    print("    tried", found[-1], flush=True)
  return min(found, key=lambda x: x["bundles_per_token_head"])


def floors(generation: str, F: int) -> str:
  """Return the least times of both passes at the public peak rates."""
  hbm, mxu = PEAKS[generation]
  E = F * (F // 2 + 1)
  forward = 2 * (2 * F + 2 * P), 4 * E * P
  both = (
    forward[0] + 2 * (6 * F + 5 * P) + 16,
    forward[1] + 2 * E * P * 5,
  )
  parts = [
    f"{name} HBM {bytes_ / hbm:.3f}, MXU {flop / mxu:.3f}"
    for name, (bytes_, flop) in (("forward", forward), ("both", both))
  ]
  return f"floors in ns per token and head: {'; '.join(parts)}"


def xla_cost(generation: str, F: int) -> dict:
  """Return XLA's cost analysis of "xla", forward and backward together.

  One chunk with an initial state is analysed, because XLA's analysis counts one
  iteration of a loop.
  """
  cost = compiled(generation, *functions(F)["xla"]).cost_analysis()
  tokens = B * H * xla_chunked.CHUNKS.chunk
  return dict(
    flop_per_token_head=round(cost["flops"] / tokens),
    bytes_per_token_head=round(cost["bytes accessed"] / tokens),
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--generations", nargs="+", default=GENERATIONS)
  parser.add_argument("--features", nargs="+", type=int, default=[16])
  parser.add_argument("--sweep", action="store_true")
  parser.add_argument("--write", action="store_true")
  options = parser.parse_args()
  print(CAPTION)
  made_by = dict(
    caption=CAPTION,
    jax=jax.__version__,
    libtpu=importlib.metadata.version("libtpu"),
    date=datetime.date.today().isoformat(),
    shape=dict(B=B, T=T, H=H, P=P, dtype="bfloat16", coefficients="REBASED"),
  )
  results = dict(made_by, figures={})
  for generation, F in itertools.product(options.generations, options.features):
    print(f"{generation}, F={F}, P={P}, T={T}")
    figures, total = {}, 0.0
    for kernel in KERNELS:
      figures[kernel] = (sweep if options.sweep else schedule)(
        generation, kernel, F
      )
      total += figures[kernel]["bundles_per_token_head"]
      print(f"  {kernel}:", figures[kernel], flush=True)
    print(f"  together: {total:.2f} bundles per token and head")
    figures["xla"] = xla_cost(generation, F)
    print("  xla, forward and backward:", figures["xla"])
    print(" ", floors(generation, F), flush=True)
    results["figures"][f"{generation}-F{F}"] = figures
  if options.write:
    path = ROOT / "benchmarks" / "results" / "tpu_schedule.json"
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
  main()
