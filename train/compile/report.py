"""`rebased compile`: the training step, for TPUs that are not attached.

libtpu describes a slice by its name, `v5e:4x4`, and XLA compiles for it the
same function that the run would, so what it says of memory is what the run
will need. FLOPs are those of the step's matrix products (`flops.py`), what
moves between devices that of its collectives (`collectives.py`); over the peak
and over the interconnect's bandwidth (`peaks.py`) they are the least times of
a step, of which nothing here is measured.
"""

import dataclasses
from typing import Any

from flax import nnx
import jax
from jax.experimental import topologies
from rich.console import Console

from rebased_jax import parameter_count
from train import build
from train.compile import collectives, flops
from train.config import RunConfig
from train.console import rows
from train.devices import mesh as mesh_lib, mesh_report, peaks

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


@dataclasses.dataclass(frozen=True)
class Traffic:
  """The collectives of one kind, a device and a step."""

  times: int
  result: int  # bytes of their results
  moved: float  # bytes that leave the device


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What XLA says of a compiled function, a device."""

  arguments: int  # bytes of state, batch and key
  temporary: int  # bytes beside them, at the worst moment
  code: int  # bytes of the program
  traffic: dict[str, Traffic]  # by kind

  @property
  def memory(self) -> int:
    return self.arguments + self.temporary + self.code

  @property
  def moved(self) -> float:
    return sum(x.moved for x in self.traffic.values())


@dataclasses.dataclass(frozen=True)
class Report:
  """A training step on a slice."""

  devices: int
  kind: str  # of device
  parameters: int
  tokens: int  # of a step
  products: float  # FLOPs of matrix products, a device
  found: Compiled | None  # None: it does not fit
  reason: str | None = None  # why, in the compiler's words

  @property
  def limit(self) -> int | None:
    """Bytes of a device's memory, where they are known."""
    return HBM.get(self.kind)

  @property
  def fits(self) -> bool:
    if self.found is None:
      return False
    return self.limit is None or self.found.memory <= self.limit

  @property
  def model_flops(self) -> float:
    """6 · parameters · tokens, a device."""
    return 6 * self.parameters * self.tokens / self.devices

  @property
  def seconds(self) -> float | None:
    """The least time of the matrix products."""
    peak = peaks.PEAK_FLOPS.get(self.kind)
    return None if peak is None else self.products / peak

  @property
  def seconds_moving(self) -> float | None:
    """The least time of the collectives, all links in use."""
    bandwidth = peaks.INTERCONNECT.get(self.kind)
    if bandwidth is None or self.found is None:
      return None
    return self.found.moved / bandwidth


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
  result = report(config, mesh)
  found, limit = result.found, result.limit
  if found is None:
    console.print(
      f"does not fit: {result.reason}", highlight=False, soft_wrap=True
    )
    return 1
  console.print(rows("a device and step", _rows(result, found)))
  verdict = "it fits" if result.fits else "does not fit"
  known = f"of {limit / GIB:.0f} GiB" if limit else f"; {kind}: HBM not known"
  console.print(
    f"{verdict if limit else 'compiled'}: {found.memory / GIB:.3f} GiB {known}",
    highlight=False,
  )
  return 0 if result.fits else 1


def report(config: RunConfig, mesh: jax.sharding.Mesh) -> Report:
  """Compiles the step for a mesh whose devices need not be there.

  Raises:
    ValueError: the run does not fit the mesh.
  """
  traced = trace(config, mesh)
  found, reason = None, None
  try:
    found = measure(lower(traced, mesh).compile(), mesh.size)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    reason = str(error).partition("RESOURCE_EXHAUSTED: ")[2].splitlines()[0]
  return Report(
    devices=mesh.size,
    kind=mesh.devices.flat[0].device_kind,
    parameters=parameter_count(build.abstract_model(config)),
    tokens=config.batch * config.data.length,
    products=flops.of_jaxpr(traced.jaxpr) / mesh.size,
    found=found,
    reason=reason,
  )


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


def trace(config: RunConfig, mesh: jax.sharding.Mesh) -> Any:
  """The training step, traced for a mesh whose devices need not be there."""
  with jax.set_mesh(mesh):
    steps = build.steps(config, mesh)
    return steps.train_step.trace(*build.inputs(config, steps))


def lower(traced: Any, mesh: jax.sharding.Mesh) -> Any:
  """The same, lowered."""
  with jax.set_mesh(mesh):
    return traced.lower()


def measure(compiled: Any, devices: int) -> Compiled:
  """What a compiled function needs, on a mesh of so many devices."""
  memory = compiled.memory_analysis()
  unshared = memory.output_size_in_bytes - memory.alias_size_in_bytes
  traffic: dict[str, Traffic] = {}
  for x in collectives.find(compiled.as_text(), devices):
    before = traffic.get(x.kind, Traffic(0, 0, 0))
    traffic[x.kind] = Traffic(
      before.times + x.times,
      before.result + x.times * x.size,
      before.moved + x.moved,
    )
  return Compiled(
    memory.argument_size_in_bytes,
    memory.temp_size_in_bytes + unshared,
    memory.generated_code_size_in_bytes,
    traffic,
  )


def _rows(result: Report, found: Compiled) -> dict[str, str]:
  mib = lambda size: f"{size / 2**20:,.1f} MiB"
  limit = result.limit
  values = {
    "state and batch": mib(found.arguments),
    "temporary": mib(found.temporary),
    "program": mib(found.code),
    "memory": mib(found.memory)
    + (f", {found.memory / limit:.1%} of its HBM" if limit else ""),
    "FLOPs of matrix products": f"{result.products:.3e}",
    "FLOPs by 6 · parameters · tokens": f"{result.model_flops:.3e}",
  }
  for kind, x in sorted(found.traffic.items()):
    values[kind] = f"{x.times:,} of {mib(x.result)}, {mib(x.moved)} leave it"
  if result.seconds is not None and result.seconds_moving is not None:
    values["at its peak, products take"] = f"{result.seconds:.3f} s"
    values["at full bandwidth, collectives take"] = (
      f"{result.seconds_moving:.3f} s"
    )
  return values
