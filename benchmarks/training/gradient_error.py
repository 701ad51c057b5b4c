"""Take the gradient's error apart, kernel by kernel, and look for bias in it.

    python benchmarks/training/gradient_error.py
    python benchmarks/training/gradient_error.py --judge RECORD
    JAX_PLATFORMS=cpu python benchmarks/training/gradient_error.py --quick

A gradient g is compared with g₃₂, float32's by plain XLA with products of the
highest precision, over the whole and for each parameter, in N batches, at the
initial parameters and after some steps of training with all kernels:

- with all kernels, and in plain XLA in bfloat16;
- with all kernels but one, which XLA computes instead ("without-NAME");
- with one kernel alone ("only-NAME");
- with all kernels and a seeded defect in the operator ("wrong-NAME").

The verdict has four conditions, which the kernels keep at both points.

Size. The error ‖g − g₃₂‖ / ‖g₃₂‖ of the whole and of the mixers is at most 1.1
times XLA's, that of any parameter at most 1.5 times. It shows whether kernels
round more than XLA. It hides a small defect. Rounding in bfloat16 makes errors
of 4 to 80 %, and errors without relation add up as squares: a defect of 1 %
changes an error of 10 % to 10.05 %.

Swap. "without-operator" differs from the kernels in the operator alone. Rounded
parameters and all other roundings are shared, so that two right operators have
nearly equal errors in the same batches. An error of d times the shared one that
has no relation to it multiplies it by √(1 + d²). The ratio of the errors of the
whole, of the mixers and of each parameter lies between 1 / 1.05 and 1.05, which
is d = 0.32. In the first record no exchange of one right kernel for XLA's form
moved an error by more than 3.5 %, but for GELU, whose XLA form rounds more.

Bias. The share of the error along the exact gradient,

    c = <g − g₃₂, g₃₂> / <g₃₂, g₃₂>,

is by how much g is too long. Rounding to the nearest has mean 0 and no relation
to g₃₂. So c is small beside the error, and its mean over N batches falls with
1/√N. A kernel that loses a share δ of a sum, or makes its terms larger by δ,
has c near ±δ in every batch. The difference of c to that of "without-operator"
leaves out the shared roundings. One rounding to bfloat16 changes a number by at
most 2⁻⁸ = 0.4 %. A smaller bias may be that of a single systematic rounding, a
larger one is not: |mean of the difference| is at most 2⁻⁸ + 3 s, where s is its
standard error over batches. So 1 % in size is seen.

Loss. |Mean over batches of the loss minus that of "without-operator"| is at
most 3 s above what bfloat16 itself changes: the root mean square of XLA's loss
minus float32's.

A defect that breaks no condition is invisible to them. The verdict lists what
each wrong kernel breaks. Those of `MUST_FAIL` have to break one. The others
change each number by a random 1 %, the value ("wrong-values") or its gradient
("wrong-gradient"). Such errors average out as rounding does, and may pass. The
script exits with 1 if the verdict is not passed.

Size was fixed before the first run. The other three were added after it,
because size alone had not noticed two of three wrong kernels.
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
#: The largest ratio, either way, to the error with XLA's operator.
SWAP = 1.05
#: The largest relative change by one rounding to bfloat16.
BIAS = 2.0**-8
SIGMAS = 3
XLA, SWAPPED = "xla", "without-operator"
MUST_FAIL = ("wrong-size", "wrong-tokens")
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


ALWAYS = ("float32", "kernels", XLA, SWAPPED)
IN_QUICK = ("wrong-tokens", "wrong-size")


def lower_gradient(variant: Variant, sizes: Sizes, text_length: int) -> Any:
  """Lower (parameters, tokens, index of a batch) → mean loss, its gradient."""

  def gradient(params, tokens, index, *, program):
    key = jax.random.fold_in(jax.random.key(2**31 - 2), index)
    batch = variants.batch_at(tokens, key, sizes, held_out=True)
    loss = lambda params: step.loss_sums(params, batch, program)[0]
    count = batch["weights"].size
    found = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda x: x / count, found)

  with variants.traced_as(variant):
    program = variants.program(variants.config_of(sizes.model(), variant), 1000)
    params = jax.eval_shape(lambda: variants.init_params(sizes, np.int32(0)))
    tokens = jax.ShapeDtypeStruct((text_length,), "int32")
    index = jax.ShapeDtypeStruct((), "int32")
    run = functools.partial(gradient, program=program)
    return jax.jit(run).lower(params, tokens, index)


@jax.jit
def _products(found: Any, wanted: Any) -> Any:
  """Return (‖error‖², ‖wanted‖², ⟨error, wanted⟩) of each parameter."""

  def products(a: Any, b: Any) -> tuple[Any, Any, Any]:
    error = a - b
    return jnp.sum(error * error), jnp.sum(b * b), jnp.sum(error * b)

  return jax.tree.map(products, found, wanted)


def _relative(products: np.ndarray) -> np.ndarray:
  """Return √(error² / norm²) of an array (…, 3)."""
  return np.sqrt(products[..., 0] / np.maximum(products[..., 1], 1e-300))


def _row(
  each_NL3: np.ndarray,
  mean_L3: np.ndarray,
  loss_N: np.ndarray,
  names: list[str],
) -> dict[str, Any]:
  """Return the errors of one variant.

  Args:
    each_NL3: products of N ≥ 2 batches and L parameters.
    mean_L3: the same of the mean gradient.
    loss_N: the loss of each batch minus float32's.
    names: the parameters.
  """
  of_mixer_L = np.array([MIXER in name for name in names])
  whole_N = _relative(each_NL3.sum(axis=1))
  mixers_N = _relative(each_NL3[:, of_mixer_L].sum(axis=1))
  spread = whole_N.std(ddof=1) / math.sqrt(len(whole_N))
  by_parameter = _relative(each_NL3.sum(axis=0))
  along_NL = each_NL3[..., 2] / np.maximum(each_NL3[..., 1], 1e-300)
  return {
    "error": round(float(whole_N.mean()), 6),
    "standard_error": round(float(spread), 6),
    "mixers": round(float(mixers_N.mean()), 6),
    "of_mean": round(float(_relative(mean_L3.sum(axis=0))), 6),
    "parameters": {
      name: round(float(x), 5)
      for name, x in zip(names, by_parameter, strict=True)
    },
    "errors": [float(f"{x:.4g}") for x in whole_N],
    "loss_minus_float32": [float(f"{x:.4g}") for x in loss_N],
    "along": {
      name: [float(f"{x:.4g}") for x in along_N]
      for name, along_N in zip(names, along_NL.T, strict=True)
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
  losses: dict[str, list] = {name: [] for name in measured}

  def products(found: Any, wanted: Any) -> np.ndarray:
    leaves = jax.tree.leaves(jax.device_get(_products(found, wanted)))
    return np.float64(leaves).reshape(-1, 3)

  for index in range(batches):
    right, wanted = programs["float32"](params, tokens, np.int32(index))
    for name in measured:
      loss, found = programs[name](params, tokens, np.int32(index))
      losses[name].append(float(loss) - float(right))
      each[name].append(products(found, wanted))
      sums[name] = add(sums[name], found) if name in sums else found
  return {
    name: _row(
      np.stack(each[name]),
      products(total, sums["float32"]),
      np.array(losses[name]),
      names,
    )
    for name, total in sums.items()
    if name != "float32"
  }


def _ratios(found: dict[str, Any], peer: dict[str, Any]) -> dict[str, float]:
  """Return the ratios of two variants' errors: whole, mixers, parameters."""
  theirs = peer["parameters"]
  # A parameter that bfloat16 does not touch has no error.
  ratios = {
    name: value / theirs[name]
    for name, value in found["parameters"].items()
    if theirs[name] > 0
  }
  ratios |= {part: found[part] / peer[part] for part in ("error", "mixers")}
  return {part: round(ratio, 4) for part, ratio in ratios.items()}


def _sizes(found: dict[str, Any], xla: dict[str, Any]) -> dict[str, float]:
  """Return the ratios to XLA's errors, by the keys of `GATE`."""
  ratios = _ratios(found, xla)
  parts = {part: ratios.pop(part) for part in ("error", "mixers")}
  return parts | {"worst": max(ratios.values())}


def _swap(found: dict[str, Any], swapped: dict[str, Any]) -> dict[str, float]:
  """Return the smallest and largest ratio to the error of another operator."""
  ratios = _ratios(found, swapped).values()
  return {"smallest": min(ratios), "largest": max(ratios)}


def _mean_difference(a: list[float], b: list[float]) -> tuple[float, float]:
  """Return the mean of a − b over batches, and its standard error."""
  difference = np.subtract(a, b)
  error = difference.std(ddof=1) / math.sqrt(len(difference))
  return float(difference.mean()), float(error)


def _biases(found: dict[str, Any], swapped: dict[str, Any]) -> dict[str, Any]:
  """Return [mean, standard error] of the difference of c, by parameter."""
  return {
    name: [round(x, 6) for x in _mean_difference(along, swapped["along"][name])]
    for name, along in found["along"].items()
  }


def _judge_variant(name: str, rows: dict[str, Any]) -> dict[str, Any]:
  """Return what is measured of a variant at one point, and what it breaks."""
  found, xla, swapped = rows[name], rows[XLA], rows[SWAPPED]
  sizes, swap = _sizes(found, xla), _swap(found, swapped)
  broken = [f"size of {x}" for x, ratio in sizes.items() if ratio > GATE[x]]
  if swap["smallest"] < 1 / SWAP or swap["largest"] > SWAP:
    broken.append("swap")
  row: dict[str, Any] = {"sizes": sizes, "swap": swap}
  if "along" in found:
    biases = _biases(found, swapped)
    row["biased"] = {
      parameter: [mean, s]
      for parameter, (mean, s) in biases.items()
      if abs(mean) > BIAS + SIGMAS * s
    }
    row["largest_bias"] = max(biases.values(), key=lambda x: abs(x[0]))
    broken += ["bias"] if row["biased"] else []
    own, theirs, rounding = (
      x["loss_minus_float32"] for x in (found, swapped, xla)
    )
    mean, s = _mean_difference(own, theirs)
    limit = math.sqrt(np.square(rounding).mean()) + SIGMAS * s
    row["loss"] = [float(f"{x:.3g}") for x in (mean, s, limit)]
    broken += ["loss"] if abs(mean) > limit else []
  return row | {"broken": broken}


def judge(points: dict[str, dict[str, Any]]) -> dict[str, Any]:
  """Return what the kernels and each wrong kernel break, and the verdict.

  Args:
    points: rows by variant, at each point. Older records have no "along": their
      bias and loss are not judged, and the verdict is not passed.
  """
  names = next(iter(points.values()))
  judged = [x for x in names if x == "kernels" or x.startswith("wrong")]
  found = {
    name: {point: _judge_variant(name, rows) for point, rows in points.items()}
    for name in judged
  }
  broken = {
    name: sorted({x for row in of_points.values() for x in row["broken"]})
    for name, of_points in found.items()
  }
  is_whole = all("along" in rows["kernels"] for rows in points.values())
  return {
    "limits": GATE | {"swap": SWAP, "bias": BIAS, "standard errors": SIGMAS},
    "judges_bias_and_loss": is_whole,
    "variants": found,
    "broken": broken,
    "passes": is_whole
    and not broken["kernels"]
    and all(broken.get(name) for name in MUST_FAIL),
  }


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


def report(verdict: dict[str, Any]) -> str:
  """Return the verdict as text."""
  lines = []
  if not verdict["judges_bias_and_loss"]:
    lines.append("bias and loss are not in this record, and not judged")
  for name, broken in verdict["broken"].items():
    lines.append(f"{name:<16} breaks {', '.join(broken) or 'nothing'}")
    for point, row in verdict["variants"][name].items():
      sizes = ", ".join(f"{key} {x:.3f}" for key, x in row["sizes"].items())
      low, high = row["swap"].values()
      lines.append(f"  {point}: sizes {sizes}; swap {low:.3f} to {high:.3f}")
      if "loss" in row:
        mean, s, limit = row["loss"]
        bias, error = row["largest_bias"]
        lines.append(
          f"    largest bias {bias:+.4f}±{error:.4f}, {len(row['biased'])} too "
          f"large; loss {mean:+.2g}±{s:.1g}, limit {limit:.2g} nats"
        )
  missing = [name for name in MUST_FAIL if not verdict["broken"].get(name)]
  if missing:
    lines.append(f"not noticed, or not measured: {', '.join(missing)}")
  return "\n".join([*lines, "passed" if verdict["passes"] else "NOT passed"])


def write(path: Path, record: dict[str, Any]) -> None:
  """Write a record with its verdict."""
  path.parent.mkdir(parents=True, exist_ok=True)
  text = json.dumps(record | {"verdict": judge(record["points"])})
  path.write_text(text + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--steps", type=int, default=250, help="of training")
  parser.add_argument("--batches", type=int, default=32)
  names = [name for name in VARIANTS if name not in ALWAYS]
  parser.add_argument(
    "--variants",
    nargs="+",
    choices=names,
    default=names,
    help=f"variants to measure, beside {', '.join(ALWAYS)}",
  )
  parser.add_argument(
    "--quick",
    action="store_true",
    help="a tiny model and a few variants, for a CPU; not judged",
  )
  parser.add_argument(
    "--judge",
    type=Path,
    metavar="RECORD",
    help="measure nothing; judge a record again, and write its verdict",
  )
  out = RESULTS / "gradient_error.json"
  parser.add_argument("--out", type=Path, default=out, help="the record")
  args = parser.parse_args()
  if args.batches < 2:
    parser.error(f"--batches {args.batches}: expected at least 2")
  return args


def judge_again(path: Path) -> None:
  """Judge a record, and write the verdict into it."""
  record = json.loads(path.read_text(encoding="utf-8"))
  write(path, record)
  conclude(record["points"])


def conclude(points: dict[str, dict[str, Any]]) -> None:
  """Print the verdict; exit with 1 if it is not passed."""
  verdict = judge(points)
  print(report(verdict))
  if not verdict["passes"]:
    sys.exit(1)


def main() -> None:
  args = parse()
  if args.judge is not None:
    judge_again(args.judge)
    return
  sizes = variants.QUICK if args.quick else SIZES
  tokens, text = variants.make_tokens(sizes)
  wanted = IN_QUICK if args.quick else args.variants
  names = [name for name in VARIANTS if name in (*ALWAYS, *wanted)]
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
    "environment": describe("pallas_kernels", "rebased_jax", "train"),
  }
  write(args.out, record)
  print(table(points))
  if args.quick:
    print(report(judge(points)))
    return
  conclude(points)


if __name__ == "__main__":
  main()
