"""Measures the kernels' free sizes on the card at hand; writes its table.

    python -m pallas_kernels.tuning [--specs lm-1k …] [--out h100.json]

For every shape of `arg_specs` the sizes that cut its time differently are
timed, each after a check of its values against "xla" in float32, and then, up
to T = 1024, "xla" and "reference" beside them; short rows are measured as
well, for where the kernels stop to be the fastest. Times are of the public
call with its backward, wall time, the median of several runs. The default
stays where nothing is faster by more than `MARGIN`.
"""

import argparse
from collections.abc import Callable, Sequence
from concurrent import futures
import datetime
import os
from pathlib import Path
import sys

import jax
import jax.numpy as jnp

from pallas_kernels import devices, measure
from pallas_kernels.polynomial import arg_specs, tuned
from pallas_kernels.polynomial.arg_specs import ArgSpec
from pallas_kernels.polynomial.tuned import DEFAULT, Entry, Shape, Sizes, Table

PROGRAMS = (66, 132, 264, 396, 528)
CHUNKS = (8, 16, 32)
MARGIN = 0.03  # of the time; two timings of one program differ by less
LONGEST = 1024  # T at which "xla" and "reference" are timed too
_QUADRATIC_BYTES = 8 << 30  # of a call of "reference", at most
_TIMED = (
  "median wall ms of the public call with its backward, bfloat16, values "
  "checked first"
)

# Rows short enough that another implementation may win.
SHORT: tuple[ArgSpec, ...] = tuple(
  ArgSpec(f"short-{T}x{B * 12}", B, T, 12, 16, 64)
  for T in (16, 64, 256)
  for B in (1, 8, 64)
)


# (shape, implementation, sizes) → ms, or None: it cannot or should not run.
Timer = Callable[[ArgSpec, str, Sizes], float | None]


def shape_of(spec: ArgSpec) -> Shape:
  """What the table is looked up by."""
  square = not spec.coefficients.affine
  return Shape(spec.B * spec.H, spec.T, spec.F, spec.P, square)


def candidates(spec: ArgSpec) -> list[Sizes]:
  """Sizes that cut this shape's time differently, the default first."""
  shape, total = shape_of(spec), -(-spec.T // tuned.CHUNK)
  found: dict[int, Sizes] = {}
  grid = [Sizes(p, c) for p in PROGRAMS for c in CHUNKS]
  for sizes in (DEFAULT, *grid):
    slices = max(1, shape.programs(sizes) // shape.walks)
    length = -(-total // slices)
    found.setdefault(-(-total // length), sizes)
  return list(found.values())


def tune(
  specs: Sequence[ArgSpec], timer: Timer, tell: Callable[[str], None] = print
) -> tuple[Entry, ...]:
  """An entry for each shape.

  Raises:
    RuntimeError: the kernels' default could not be timed.
  """
  entries = []
  for spec in specs:
    entry = _entry(spec, timer)
    entries.append(entry)
    tell(f"{spec.name}: {entry.sizes}, {entry.implementation}, {entry.ms}")
  return tuple(entries)


def _entry(spec: ArgSpec, timer: Timer) -> Entry:
  ms: dict[str, float] = {}
  best, best_ms = DEFAULT, None
  for sizes in candidates(spec):
    time = timer(spec, "gpu", sizes)
    if time is None:
      if sizes == DEFAULT:
        raise RuntimeError(f"{spec.name}: the default sizes do not run")
      continue
    ms[f"gpu, {sizes.programs} programs, {sizes.chunks} chunks"] = time
    # The default comes first; what follows must be clearly faster than it.
    margin = 1 - MARGIN if best == DEFAULT else 1
    if best_ms is None or time < best_ms * margin:
      best, best_ms = sizes, time
  fastest, fastest_ms = "gpu", best_ms * (1 - MARGIN)
  for name in ("xla", "reference") if spec.T <= LONGEST else ():
    time = timer(spec, name, best)
    if time is None:
      continue
    ms[name] = time
    if time < fastest_ms:
      fastest, fastest_ms = name, time
  return Entry(spec.name, shape_of(spec), best, fastest, ms, _TIMED)


def device_timer() -> Timer:
  """Times on this process's device; wrong values raise RuntimeError.

  The kernels of a shape are compiled side by side, which costs them nothing;
  what XLA chooses kernels for by timing them is compiled alone.
  """
  expected: dict[str, list] = {}
  programs: dict[tuple[str, str, Sizes], Callable] = {}

  def reference(spec, arrays):
    if spec.name not in expected:
      expected.clear()
      wide = [x.astype(jnp.float32) for x in arrays]
      run = _lower(spec, "xla", DEFAULT, wide).compile(measure.UNTIMED)
      expected[spec.name] = run(*wide)
    return expected[spec.name]

  def program(spec, implementation, sizes, arrays):
    key = spec.name, implementation, sizes
    if key in programs:
      return programs[key]
    if implementation != "gpu":
      return _lower(spec, implementation, sizes, arrays).compile()
    programs.clear()
    chosen = dict.fromkeys((sizes, *candidates(spec)))
    lowered = {x: _lower(spec, "gpu", x, arrays) for x in chosen}
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      jobs = {x: pool.submit(y.compile) for x, y in lowered.items()}
    for other, job in jobs.items():
      programs[spec.name, "gpu", other] = job.result()
    return programs[key]

  def timer(spec, implementation, sizes):
    square_bytes = 24 * spec.B * spec.H * spec.T**2
    if implementation == "reference" and square_bytes > _QUADRATIC_BYTES:
      return None
    arrays = measure.inputs(spec)
    checked = (*arrays[:3], measure.settled(arrays[3]))
    wanted = reference(spec, checked)
    run = program(spec, implementation, sizes, arrays)
    errors = measure.relative(run(*checked), wanted)
    if not all(error <= measure.TOLERANCE for error in errors):
      raise RuntimeError(
        f"{spec.name}, {implementation}, {sizes}: wrong values, {errors}"
      )
    return measure.milliseconds(lambda: run(*arrays))

  return timer


def _lower(spec: ArgSpec, implementation: str, sizes: Sizes, arrays):
  """A forward with its backward, its time cut by these sizes."""
  # What was traced with other sizes must not be taken again.
  jax.clear_caches()
  call = measure.operator(spec, implementation)
  with tuned.using(Table(devices.device_kind(), default=sizes)):
    return jax.jit(measure.forward_and_backward(call)).lower(*arrays)


def table_of(entries: tuple[Entry, ...]) -> Table:
  """This card's table of what was measured now."""
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  return Table(devices.device_kind(), jax.__version__, now, entries=entries)


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  every = {spec.name: spec for spec in (*arg_specs.SPECS, *SHORT)}
  parser.add_argument("--specs", nargs="+", choices=list(every))
  parser.add_argument("--out", type=Path, help="instead of the package's file")
  args = parser.parse_args(argv)
  try:
    devices.check_gpu()
  except NotImplementedError as error:
    sys.exit(f"pallas_kernels.tuning: {error}")
  if args.specs and not args.out:
    parser.error("--specs needs --out: the card's table holds every shape")
  folder = Path(tuned.__file__).parent
  out = args.out or folder / tuned.file_name(devices.device_kind())
  timer, entries = device_timer(), ()
  for name in args.specs or every:
    entries += tune([every[name]], timer)
    # After each shape, so that a run that ends early leaves what it has.
    out.write_text(tuned.dump(table_of(entries)), encoding="utf-8")
  print(f"written to {out}")


if __name__ == "__main__":
  main()
