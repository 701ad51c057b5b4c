"""One device against several with FSDP, by the trainer's own mesh.

The rows of one device are put on every one of them, so that the loss of the
first step is the same but for dropout; more than LIMIT apart ends the run. The
ratio is tokens a second of all devices over those of one.
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
import train_step_cases
from train_step_cases import Case
import train_step_run

from train import build
from train.config import MeshConfig, RunConfig, TextData
from train.devices import mesh as mesh_lib, sharding

# Of the first losses, near ln V ≈ 11: the devices' dropout differs, by 1e-2 at
# 512 tokens a row and less at more.
LIMIT = 0.05


def run_config(case: Case, chunk: int, devices: int) -> RunConfig:
  """The run of a case, its rows on each device."""
  return RunConfig(
    model=case.model,
    data=TextData(length=case.length),
    optimizer=train_step_cases.OPTIMIZER,
    steps=train_step_cases.STEPS,
    batch=case.rows * devices,
    loss_chunks=max(case.rows * case.length // chunk, 1),
    mesh=MeshConfig(fsdp=devices),
  )


class Program(NamedTuple):
  """A step on some devices."""

  config: RunConfig
  built: build.Built
  step: Any  # lowered, then compiled


def lower(case: Case, chunk: int, devices: int) -> Program:
  config = run_config(case, chunk, devices)
  mesh = mesh_lib.make_mesh(config.mesh, jax.devices()[:devices])
  with jax.set_mesh(mesh):
    built = build.build(config, mesh)
    step = built.train_step.lower(*build.inputs(config, built))
  return Program(config, built, step)


def measure_one(case: Case, program: Program, args, warm: int) -> dict:
  """Times of a compiled step, and its first loss."""
  config, built, _ = program
  devices = config.batch // case.rows
  with jax.set_mesh(built.mesh):
    runner = train_step_run.Runner(
      program.step,
      build.fresh_state(config, built),
      (case.rows, case.length),
      case.model.vocab_size,
      copies=devices,
      put=functools.partial(
        sharding.put_batch, mesh=built.mesh, rows=config.batch
      ),
      key=built.key,
    )
    first = runner.first_loss()
    runner.steps(warm)
    params = build.to_dicts(built.abstract)["params"]
    count = sum(x.size for x in jax.tree.leaves(params))
    found = train_step_run.times(runner, case, args, count, devices)
  return {"parameters": count, "first_loss": round(first, 4), **found}


def measure(cases: Sequence[Case], args, warm: int) -> list[dict[str, Any]]:
  """A row for each case: on one device, on all, and the ratio."""
  counts = {"one": 1, "all": args.devices}
  programs = {
    (index, name): lower(case, args.chunk, devices)
    for index, case in enumerate(cases)
    for name, devices in counts.items()
  }
  # One by one on a GPU, where XLA times its own kernels as it compiles.
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
      gc.collect()  # the state of the run before
    losses = [row[x]["first_loss"] for x in ("one", "all")]
    if not abs(np.subtract(*losses)) <= LIMIT:
      raise SystemExit(f"{row['case']}: losses {losses} differ, no times")
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
  """Raises SystemExit where there are fewer."""
  if devices > len(jax.devices()):
    raise SystemExit(
      f"--devices {devices}: expected at most the {len(jax.devices())} there"
    )


def settings(args) -> dict[str, Any]:
  """What the result says of itself."""
  return {
    "mesh": dataclasses.asdict(MeshConfig(data=1, fsdp=args.devices)),
    "first_losses": f"of the same rows, at most {LIMIT} apart",
  }
