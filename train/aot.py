"""`rebased compile`: the training step, for TPUs that are not attached.

libtpu describes a slice by its name, `v5e:4x4`, and XLA compiles for it the
same function that the run would, so what it says of memory is what the run
will need. Of a loop over layers it counts FLOPs and collectives once.
"""

from collections.abc import Iterator
import dataclasses
import math
import re
from typing import Any

from flax import nnx
import jax
from jax.experimental import topologies
from rich.console import Console

from rebased_jax import parameter_count
from train import build, mesh as mesh_lib, mesh_report
from train.config import RunConfig
from train.console import rows

GIB = 2**30
# What Google's pages say of a chip, by jax's device_kind.
HBM = {
  "TPU v4": 32 * GIB,
  "TPU v5 lite": 16 * GIB,
  "TPU v5": 95 * GIB,
  "TPU v5p": 95 * GIB,
  "TPU v6 lite": 32 * GIB,
  "TPU7x": 192 * GIB,
}
_COLLECTIVES = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
_BYTES = dict(pred=1, s8=1, u8=1, bf16=2, f16=2, s16=2, u16=2, f64=8, s64=8)


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What XLA says of the training step, a device each."""

  arguments: int  # bytes of state, batch and key
  temporary: int  # bytes beside them, at the worst moment
  code: int  # bytes of the program
  flops: float  # a loop's body once
  collectives: dict[str, tuple[int, int]]  # kind: (how many, bytes)

  @property
  def memory(self) -> int:
    return self.arguments + self.temporary + self.code


def show(config: RunConfig, topology: str, console: Console) -> int:
  """Compiles the step and prints what it needs; 0 where it fits, else 1.

  Args:
    config: the run, its mesh included.
    topology: of the slice, as `v5e:4x4`.
    console: where to.

  Raises:
    ValueError: there is no such slice, or the run does not fit its mesh.
    NotImplementedError: there is no libtpu here.
  """
  devices = describe(topology)
  mesh = mesh_lib.make_mesh(config.mesh, devices)
  kind = devices[0].device_kind
  console.print(
    f"{topology}: {len(devices)} × {kind}; compiling", highlight=False
  )
  abstract = build.abstract_model(config)
  params = nnx.to_pure_dict(nnx.state(abstract, nnx.Param))
  lines, _ = mesh_report.describe(config, params, mesh.shape)
  for line in lines:
    console.print(line, highlight=False, soft_wrap=True)
  limit = HBM.get(kind)
  try:
    found = measure(lower(config, mesh).compile())
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    why = str(error).partition("RESOURCE_EXHAUSTED: ")[2].splitlines()[0]
    console.print(f"does not fit: {why}", highlight=False, soft_wrap=True)
    return 1
  tokens = config.batch * config.data.length
  model = 6 * parameter_count(abstract) * tokens / len(devices)
  console.print(rows("a device", _rows(found, model, limit)))
  fits = limit is None or found.memory <= limit
  verdict = "it fits" if fits else "does not fit"
  known = f"of {limit / GIB:.0f} GiB" if limit else f"; {kind}: HBM not known"
  console.print(
    f"{verdict if limit else 'compiled'}: {found.memory / GIB:.3f} GiB {known}",
    highlight=False,
  )
  return 0 if fits else 1


def describe(topology: str) -> list[jax.Device]:
  """The devices of a slice; they can be compiled for, not computed on.

  Raises:
    ValueError: there is no such slice.
    NotImplementedError: there is no libtpu here.
  """
  try:
    return topologies.get_topology_desc(
      platform="tpu", topology_name=topology
    ).devices
  except Exception as error:  # noqa: BLE001  # jax has a class for each cause
    text = str(error)
    missing = "not installed" in text or isinstance(error, ImportError)
    if missing or "libtpu" in text.lower():
      raise NotImplementedError(
        "rebased compile needs libtpu, with which XLA compiles for TPUs "
        f"(pip install libtpu): {text.splitlines()[0]}"
      ) from error
    raise ValueError(
      f"topology={topology!r}: expected the name of a slice, as v5e:4x4 or "
      f"v5p:2x2x2 ({text.splitlines()[0]})"
    ) from error


def lower(config: RunConfig, mesh: jax.sharding.Mesh) -> Any:
  """The training step, lowered for a mesh whose devices need not be there."""
  with jax.set_mesh(mesh):
    steps = build.steps(config, mesh)
    return steps.train_step.lower(*build.inputs(config, steps))


def measure(compiled: Any) -> Compiled:
  """What a compiled function needs."""
  memory = compiled.memory_analysis()
  unshared = memory.output_size_in_bytes - memory.alias_size_in_bytes
  counts: dict[str, tuple[int, int]] = {}
  for kind, size in collectives(compiled.as_text()):
    number, total = counts.get(kind, (0, 0))
    counts[kind] = (number + 1, total + size)
  return Compiled(
    memory.argument_size_in_bytes,
    memory.temp_size_in_bytes + unshared,
    memory.generated_code_size_in_bytes,
    compiled.cost_analysis().get("flops", math.nan),
    counts,
  )


def collectives(text: str) -> Iterator[tuple[str, int]]:
  """(kind, bytes of the result) of each collective in a module's text.

  Fused with computations, one collective stands in several of them, with one
  channel.
  """
  kinds = "|".join(_COLLECTIVES)
  seen = set()
  for line in text.splitlines():
    found = re.search(rf" = (.*?) ({kinds})(-start)?\(", line)
    if found is None:
      continue
    channel = re.search(r"channel_id=(\d+)", line)
    if channel is not None:
      if channel[1] in seen:
        continue
      seen.add(channel[1])
    arrays = re.findall(r"([a-z]+\d*)\[([\d,]*)\]", found[1])
    sizes = [
      _BYTES.get(dtype, 4) * math.prod(map(int, shape.split(",")))
      for dtype, shape in arrays
      if shape  # scalars of an asynchronous one are its bookkeeping
    ] or [4]
    if found[3] and found[2] in ("all-gather", "collective-permute"):
      sizes = sizes[len(sizes) // 2 :]  # the first half is what goes in
    yield found[2], sum(sizes)


def _rows(found: Compiled, model: float, limit: int | None) -> dict[str, str]:
  mib = lambda size: f"{size / 2**20:,.1f} MiB"
  values = {
    "state and batch": mib(found.arguments),
    "temporary": mib(found.temporary),
    "program": mib(found.code),
    "memory": mib(found.memory)
    + (f", {found.memory / limit:.1%} of its HBM" if limit else ""),
    "FLOPs by XLA, loops once": f"{found.flops:.3e}",
    "FLOPs by 6 · parameters · tokens": f"{model:.3e}",
  }
  for kind, (number, size) in sorted(found.collectives.items()):
    values[f"{kind}, loops once"] = f"{number} of {mib(size)} together"
  return values
