"""Compare a training step on one device with one on several, with FSDP.

Every device gets the same rows. The loss of the first step is therefore the
same but for dropout; a difference above LIMIT ends the run. The ratio is tokens
per second of all devices over tokens per second of one.
"""

from collections.abc import Sequence
from concurrent import futures
import dataclasses
import functools
import gc
import os
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.train_step import cases as step_cases, runner
from benchmarks.train_step.cases import Case
from train import compiled_steps
from train.config import MeshConfig, RunConfig, TextData
from train.devices import batch_sharding, mesh as mesh_lib

# The largest difference of the first losses, which are near ln V ≈ 11. Dropout
# differs between devices: by 1e-2 with 512 tokens a row, less with more.
LIMIT = 0.05


def run_config(case: Case, chunk: int, devices: int) -> RunConfig:
  """Return the config of a run with the case's rows on each device."""
  return RunConfig(
    model=case.model,
    data=TextData(length=case.length),
    optimizer=step_cases.OPTIMIZER,
    steps=step_cases.STEPS,
    batch=case.rows * devices,
    loss_chunks=max(case.rows * case.length // chunk, 1),
    mesh=MeshConfig(fsdp=devices),
  )


class Program(NamedTuple):
  """A training step on some devices; `step` is lowered, then compiled."""

  config: RunConfig
  built: compiled_steps.Built
  step: Any


def lower(case: Case, chunk: int, devices: int) -> Program:
  config = run_config(case, chunk, devices)
  mesh = mesh_lib.make_mesh(config.mesh, jax.devices()[:devices])
  with jax.set_mesh(mesh):
    built = compiled_steps.build(config, mesh)
    step = built.train_step.lower(*compiled_steps.step_inputs(config, built))
  return Program(config, built, step)


def measure_one(case: Case, program: Program, args, warm: int) -> dict:
  """Return the times of a compiled step, and its first loss."""
  config, built, _ = program
  devices = config.batch // case.rows
  with jax.set_mesh(built.mesh):
    steps = runner.Runner(
      program.step,
      compiled_steps.fresh_state(config, built),
      (case.rows, case.length),
      case.model.vocab_size,
      copies=devices,
      put=functools.partial(
        batch_sharding.put_batch, mesh=built.mesh, rows=config.batch
      ),
      key=built.key,
    )
    first = steps.first_loss()
    steps.steps(warm)
    params = compiled_steps.to_dicts(built.abstract)["params"]
    count = sum(x.size for x in jax.tree.leaves(params))
    found = runner.times(steps, case, args, count, devices)
  return {"parameters": count, "first_loss": round(first, 4), **found}


def measure(cases: Sequence[Case], args, warm: int) -> list[dict[str, Any]]:
  """Return a row for each case: on one device, on all, and their ratio."""
  counts = {"one": 1, "all": args.devices}
  programs = {
    (index, name): lower(case, args.chunk, devices)
    for index, case in enumerate(cases)
    for name, devices in counts.items()
  }
  # One at a time on a GPU: XLA measures candidate kernels while it compiles.
  jobs = 1 if jax.devices()[0].platform == "gpu" else os.cpu_count()
  with futures.ThreadPoolExecutor(jobs) as pool:
    steps = pool.map(lambda program: program.step.compile(), programs.values())
    for place, step in zip(list(programs), steps, strict=True):
      programs[place] = programs[place]._replace(step=step)
  rows = []
  for index, case in enumerate(cases):
    row = dict(case.row, devices=args.devices)
    for name in counts:
      row[name] = measure_one(case, programs.pop((index, name)), args, warm)
      gc.collect()  # frees the state of the run that has just ended
    losses = [row[x]["first_loss"] for x in ("one", "all")]
    if not abs(np.subtract(*losses)) <= LIMIT:
      raise SystemExit(
        f"{row['case']}: the first losses {losses} on one device and on all "
        f"differ by more than {LIMIT}; not timed"
      )
    rates = [row[x]["tokens_per_second"] for x in ("all", "one")]
    row["ratio"] = round(rates[0] / rates[1], 3)
    print(table([row])[1], flush=True)
    rows.append(row)
  return rows


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
  lines = ["case                 length  rows  tokens/s of 1      of N  ratio"]
  for row in rows:
    rates = [row[x]["tokens_per_second"] for x in ("one", "all")]
    lines.append(
      f"{row['case']:<20} {row['length']:>6}  {row['rows']:>4}  "
      f"{rates[0]:>13,}  {rates[1]:>8,}  {row['ratio']:>5.3f}"
    )
  return lines


def require(devices: int) -> None:
  """Raise SystemExit if there are fewer devices."""
  if devices > len(jax.devices()):
    raise SystemExit(
      f"--devices {devices}: expected at most {len(jax.devices())}, the number "
      "of devices here"
    )


def settings(args) -> dict[str, Any]:
  """Return what the result file says about the method."""
  return {
    "mesh": dataclasses.asdict(MeshConfig(data=1, fsdp=args.devices)),
    "first_losses": f"of the same rows, at most {LIMIT} apart",
  }
