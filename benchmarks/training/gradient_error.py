"""Take the gradient's rounding error apart, kernel by kernel.

    python benchmarks/training/gradient_error.py
    JAX_PLATFORMS=cpu python benchmarks/training/gradient_error.py --quick

The error of a gradient g is ‖g − g₃₂‖ / ‖g₃₂‖, where g₃₂ is float32's by plain
XLA with products of the highest precision. It is measured over the whole
gradient and for each parameter, as the mean over batches, at the initial
parameters and after some steps of training with all kernels. It is measured

- with all kernels, and in plain XLA in bfloat16;
- with all kernels but one, which XLA computes instead ("without-NAME");
- with one kernel alone ("only-NAME");
- with all kernels and a defect of 1 % in the operator ("wrong-NAME").

`of_mean` is the same of the mean gradient over all batches: rounding averages
out in it, and a kernel's bias does not.

The gate, at both points: the error with all kernels is at most 1.1 times XLA's,
and that of each wrong kernel is above it. The script exits with 1 otherwise.
"""

import argparse
from concurrent import futures
import dataclasses
import functools
import json
import os
from pathlib import Path
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.environment import RESULTS, describe  # noqa: E402
from benchmarks.training import variants  # noqa: E402
from benchmarks.training.variants import KERNELS, Sizes, Variant  # noqa: E402
from train import step  # noqa: E402

GATE = 1.1
SIZES = Sizes(width=512, heads=8, pairs=4, rows=16)
WORST = 5  # parameters that are printed

VARIANTS = {
  "float32": variants.VARIANTS["float32"],
  "kernels": Variant(),
  "xla": Variant(without=KERNELS),
  **{f"without-{name}": Variant(without=(name,)) for name in KERNELS},
  **{
    f"only-{name}": Variant(without=tuple(x for x in KERNELS if x != name))
    for name in KERNELS
  },
  **{
    name: variant
    for name, variant in variants.VARIANTS.items()
    if variant.defect is not None
  },
}


def lower_gradient(variant: Variant, sizes: Sizes, text_length: int) -> Any:
  """Lower (parameters, tokens, index of a batch) → the mean loss's gradient."""

  def gradient(params, tokens, index, *, program):
    key = jax.random.fold_in(jax.random.key(2**31 - 2), index)
    batch = variants.batch_at(tokens, key, sizes, held_out=True)
    loss = lambda params: step.loss_sums(params, batch, program)[0]
    count = batch["weights"].size
    return jax.tree.map(lambda g: g / count, jax.grad(loss)(params))

  with variants.traced_as(variant):
    program = variants.program(variants.config_of(sizes.model(), variant), 1000)
    params = jax.eval_shape(lambda: variants.init_params(sizes, np.int32(0)))
    tokens = jax.ShapeDtypeStruct((text_length,), "int32")
    index = jax.ShapeDtypeStruct((), "int32")
    run = functools.partial(gradient, program=program)
    return jax.jit(run).lower(params, tokens, index)


@jax.jit
def _squares(found: Any, wanted: Any) -> Any:
  """Return (‖found − wanted‖², ‖wanted‖²) of each parameter."""
  norm = lambda x: jnp.sum(jnp.square(x))
  return jax.tree.map(lambda a, b: (norm(a - b), norm(b)), found, wanted)


def _relative(squares: np.ndarray) -> np.ndarray:
  """Return √(error² / norm²) of an array (…, 2)."""
  return np.sqrt(squares[..., 0] / np.maximum(squares[..., 1], 1e-300))


def _row(each_NL2: np.ndarray, mean_L2: np.ndarray, names: list[str]) -> dict:
  """Return the errors of one variant.

  Args:
    each_NL2: squares of N batches and L parameters.
    mean_L2: the same of the mean gradient.
    names: the parameters.
  """
  whole_N = _relative(each_NL2.sum(axis=1))
  n = len(whole_N)
  spread = whole_N.std(ddof=1) / np.sqrt(n) if n > 1 else 0.0
  by_parameter = _relative(each_NL2.sum(axis=0))
  return {
    "error": round(float(whole_N.mean()), 6),
    "standard_error": round(float(spread), 6),
    "of_mean": round(float(_relative(mean_L2.sum(axis=0))), 6),
    "parameters": {
      name: round(float(x), 5)
      for name, x in zip(names, by_parameter, strict=True)
    },
  }


def measure(
  programs: dict[str, Any], params: Any, tokens: Any, batches: int
) -> dict[str, dict[str, Any]]:
  """Return the errors of all variants at one point."""
  paths = [path for path, _ in jax.tree.leaves_with_path(params)]
  names = [jax.tree_util.keystr(x, simple=True, separator="/") for x in paths]
  add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))
  sums: dict[str, Any] = {}
  each: dict[str, list] = {name: [] for name in VARIANTS}

  def squares(found: Any, wanted: Any) -> np.ndarray:
    leaves = jax.tree.leaves(jax.device_get(_squares(found, wanted)))
    return np.float64(leaves).reshape(-1, 2)

  for index in range(batches):
    wanted = programs["float32"](params, tokens, np.int32(index))
    for name in VARIANTS:
      found = programs[name](params, tokens, np.int32(index))
      each[name].append(squares(found, wanted))
      sums[name] = add(sums[name], found) if name in sums else found
  return {
    name: _row(np.stack(each[name]), squares(total, sums["float32"]), names)
    for name, total in sums.items()
    if name != "float32"
  }


def judge(points: dict[str, dict[str, Any]]) -> dict[str, Any]:
  """Return ratios to XLA's error, and whether the gate holds."""
  judged = [
    name
    for name in next(iter(points.values()))
    if name == "kernels" or name.startswith("wrong")
  ]
  ratios = {
    point: {
      name: round(rows[name]["error"] / rows["xla"]["error"], 4)
      for name in judged
    }
    for point, rows in points.items()
  }
  passes = all(
    (ratio <= GATE) == (name == "kernels")
    for of_point in ratios.values()
    for name, ratio in of_point.items()
  )
  return {"gate": GATE, "ratios": ratios, "passes": passes}


def table(points: dict[str, dict[str, Any]]) -> str:
  """Return the errors as text."""
  lines = []
  for point, rows in points.items():
    lines.append(f"{point:<22} error     ±        of mean   worst parameters")
    for name, row in rows.items():
      worst = sorted(row["parameters"].items(), key=lambda x: -x[1])[:WORST]
      shown = ", ".join(f"{key} {value:.3f}" for key, value in worst[:2])
      lines.append(
        f"  {name:<20} {row['error']:.5f}  {row['standard_error']:.5f}  "
        f"{row['of_mean']:.5f}   {shown}"
      )
  return "\n".join(lines)


def compile_all(sizes: Sizes, tokens: int, steps: int) -> dict[str, Any]:
  """Compile the gradients of all variants, and "advance" that trains."""
  lowered = {
    name: lower_gradient(variant, sizes, tokens)
    for name, variant in VARIANTS.items()
  }
  lowered["advance"] = variants.lower_advance(
    VARIANTS["kernels"], sizes, tokens, total=4 * steps, at_once=steps
  )
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    compiled = pool.map(lambda x: x.compile(), lowered.values())
    return dict(zip(lowered, compiled, strict=True))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--steps", type=int, default=250, help="of training")
  parser.add_argument("--batches", type=int, default=8)
  parser.add_argument(
    "--quick", action="store_true", help="a tiny model, for a CPU"
  )
  out = RESULTS / "gradient_error.json"
  parser.add_argument("--out", type=Path, default=out, help="the record")
  args = parser.parse_args()
  sizes = variants.QUICK if args.quick else SIZES
  tokens, text = variants.make_tokens(sizes)
  programs = compile_all(sizes, len(tokens), args.steps)
  tokens = jax.device_put(tokens)

  state = variants.init_state(sizes, np.int32(0), 4 * args.steps)
  points = {"initial": measure(programs, state.params, tokens, args.batches)}
  state, _ = programs["advance"](state, tokens, np.int32(0))
  after = f"after {args.steps} steps"
  points[after] = measure(programs, state.params, tokens, args.batches)
  record = {
    "sizes": dataclasses.asdict(sizes),
    "steps": args.steps,
    "batches": args.batches,
    "text": text,
    "points": points,
    "verdict": judge(points),
    "environment": describe("pallas_kernels", "rebased_jax", "train"),
  }
  args.out.parent.mkdir(parents=True, exist_ok=True)
  args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
  print(table(points))
  print(record["verdict"])
  if not record["verdict"]["passes"]:
    sys.exit(1)


if __name__ == "__main__":
  main()
