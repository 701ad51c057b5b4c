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

The gate: at both points, with all kernels, the errors of the whole and of the
mixers are at most 1.1 times XLA's, and that of any parameter at most 1.5 times.
Each wrong kernel must be above one of these. The script exits with 1 otherwise.
"""

import argparse
from collections.abc import Sequence
from concurrent import futures
import dataclasses
import functools
import json
import math
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

#: The largest ratios to XLA's error: of the whole gradient, of the mixers', and
#: of the parameter with the largest ratio.
GATE = {"error": 1.1, "mixers": 1.1, "worst": 1.5}
SIZES = Sizes(width=512, heads=8, pairs=4, rows=16)
MIXER = "second/mixer/"  # in the names of the mixers' parameters
WORST = 2  # parameters that are printed

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


IN_QUICK = ("float32", "kernels", "xla", "without-operator", "wrong-tokens")


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
    each_NL2: squares of N ≥ 2 batches and L parameters.
    mean_L2: the same of the mean gradient.
    names: the parameters.
  """
  of_mixer_L = np.array([MIXER in name for name in names])
  whole_N = _relative(each_NL2.sum(axis=1))
  mixers_N = _relative(each_NL2[:, of_mixer_L].sum(axis=1))
  spread = whole_N.std(ddof=1) / math.sqrt(len(whole_N))
  by_parameter = _relative(each_NL2.sum(axis=0))
  return {
    "error": round(float(whole_N.mean()), 6),
    "standard_error": round(float(spread), 6),
    "mixers": round(float(mixers_N.mean()), 6),
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
  measured = [name for name in VARIANTS if name in programs]
  sums: dict[str, Any] = {}
  each: dict[str, list] = {name: [] for name in measured}

  def squares(found: Any, wanted: Any) -> np.ndarray:
    leaves = jax.tree.leaves(jax.device_get(_squares(found, wanted)))
    return np.float64(leaves).reshape(-1, 2)

  for index in range(batches):
    wanted = programs["float32"](params, tokens, np.int32(index))
    for name in measured:
      found = programs[name](params, tokens, np.int32(index))
      each[name].append(squares(found, wanted))
      sums[name] = add(sums[name], found) if name in sums else found
  return {
    name: _row(np.stack(each[name]), squares(total, sums["float32"]), names)
    for name, total in sums.items()
    if name != "float32"
  }


def _ratios(found: dict[str, Any], xla: dict[str, Any]) -> dict[str, float]:
  """Return the ratios of a variant's errors to XLA's, by the keys of `GATE`."""
  theirs = xla["parameters"]
  # A parameter that bfloat16 does not touch has no error in XLA.
  worst = max(
    value / theirs[name]
    for name, value in found["parameters"].items()
    if theirs[name] > 0
  )
  parts = {part: found[part] / xla[part] for part in ("error", "mixers")}
  ratios = parts | {"worst": worst}
  return {part: round(ratio, 4) for part, ratio in ratios.items()}


def judge(points: dict[str, dict[str, Any]]) -> dict[str, Any]:
  """Return ratios to XLA's errors, and whether the gate holds."""
  ratios = {
    name: {
      point: _ratios(rows[name], rows["xla"]) for point, rows in points.items()
    }
    for name in next(iter(points.values()))
    if name == "kernels" or name.startswith("wrong")
  }
  holds = {
    name: all(
      ratio <= GATE[part]
      for of_point in row.values()
      for part, ratio in of_point.items()
    )
    for name, row in ratios.items()
  }
  passes = all(holds[name] == (name == "kernels") for name in holds)
  return {"gate": GATE, "ratios": ratios, "passes": passes}


def table(points: dict[str, dict[str, Any]]) -> str:
  """Return the errors as text."""
  lines = []
  for point, rows in points.items():
    lines.append(
      f"{point:<22} error     ±        mixers   of mean   worst parameters"
    )
    for name, row in rows.items():
      worst = sorted(row["parameters"].items(), key=lambda x: -x[1])[:WORST]
      shown = ", ".join(f"{key} {value:.3f}" for key, value in worst)
      lines.append(
        f"  {name:<20} {row['error']:.5f}  {row['standard_error']:.5f}  "
        f"{row['mixers']:.5f}  {row['of_mean']:.5f}   {shown}"
      )
  return "\n".join(lines)


def compile_all(
  names: Sequence[str], sizes: Sizes, tokens: int, steps: int
) -> dict[str, Any]:
  """Compile the gradients of these variants, and "advance" that trains."""
  lowered = {
    name: lower_gradient(VARIANTS[name], sizes, tokens) for name in names
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
    "--quick",
    action="store_true",
    help="a tiny model and five variants, for a CPU; not judged",
  )
  out = RESULTS / "gradient_error.json"
  parser.add_argument("--out", type=Path, default=out, help="the record")
  args = parser.parse_args()
  if args.batches < 2:
    parser.error(f"--batches {args.batches}: expected at least 2")
  sizes = variants.QUICK if args.quick else SIZES
  tokens, text = variants.make_tokens(sizes)
  names = IN_QUICK if args.quick else tuple(VARIANTS)
  programs = compile_all(names, sizes, len(tokens), args.steps)
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
  print(json.dumps(record["verdict"], indent=1))
  if not record["verdict"]["passes"] and not args.quick:
    sys.exit(1)


if __name__ == "__main__":
  main()
