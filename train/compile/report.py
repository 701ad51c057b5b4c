"""Compile the training step for TPUs that are not attached, and report on it.

libtpu describes a slice by its name, as `v5e:4x4`. XLA compiles for it the same
function as in the run, so that the memory it reports is what the run will need.

FLOPs are those of the step's matrix products (flops.py), and traffic is that
of its collectives (collectives.py). Divided by the peak and by the bandwidth of
the interconnect (peaks.py), they give lower bounds of the time of a step.
Nothing here is measured.
"""

import dataclasses
from typing import Any

from flax import nnx
import jax
from jax.experimental import topologies
from rich.console import Console

from rebased_jax import parameter_count
from train import compiled_steps
from train.compile import collectives, flops
from train.config import RunConfig
from train.console import rows, say
from train.devices import mesh as mesh_lib, mesh_report, peaks

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Traffic:
  """All collectives of one kind, for one device and one step."""

  #: How often they run.
  times: int
  #: Bytes of their results.
  result: int
  #: Bytes that leave the device.
  moved: float


@dataclasses.dataclass(frozen=True)
class Compiled:
  """XLA's figures of a compiled function, for one device."""

  #: Bytes of state, batch and key.
  arguments: int
  #: Bytes beside them, at the worst moment.
  temporary: int
  #: Bytes of the program.
  code: int
  #: The collectives, by kind.
  traffic: dict[str, Traffic]

  @property
  def memory(self) -> int:
    """Bytes of all three."""
    return self.arguments + self.temporary + self.code

  @property
  def moved(self) -> float:
    """Bytes that leave the device, by all kinds of collectives."""
    return sum(x.moved for x in self.traffic.values())


@dataclasses.dataclass(frozen=True)
class Report:
  """A training step on a slice."""

  #: The number of devices.
  devices: int
  #: Their jax `device_kind`.
  kind: str
  #: Bytes of a device's memory. None: not known.
  limit: int | None
  #: Peak of a device's dense bfloat16 products, in FLOP/s. None: not known.
  peak: float | None
  #: Parameters of the model.
  parameters: int
  #: Tokens of a step, over all devices.
  tokens: int
  #: FLOPs of a device's matrix products.
  products: float
  #: What XLA reports. None: the step does not fit.
  found: Compiled | None
  #: The compiler's message, if the step does not fit.
  reason: str | None = None

  @property
  def fits(self) -> bool:
    """Whether the step fits the memory; True if the memory is not known."""
    if self.found is None:
      return False
    return self.limit is None or self.found.memory <= self.limit

  @property
  def model_flops(self) -> float:
    """6 · parameters · tokens, for one device."""
    return 6 * self.parameters * self.tokens / self.devices

  @property
  def seconds(self) -> float | None:
    """Seconds that the matrix products take at the device's peak."""
    return None if self.peak is None else self.products / self.peak

  @property
  def seconds_moving(self) -> float | None:
    """Seconds that the collectives take with all links in use."""
    bandwidth = peaks.INTERCONNECT.get(self.kind)
    if bandwidth is None or self.found is None:
      return None
    return self.found.moved / bandwidth


def show(config: RunConfig, topology: str, console: Console) -> int:
  """Compile the step and print what it needs.

  Args:
    config: the run, its mesh included.
    topology: the name of the slice, as `v5e:4x4`.
    console: where the report goes.

  Returns:
    0 if the step fits, else 1.

  Raises:
    ValueError: there is no such slice, or the run does not fit its mesh.
    NotImplementedError: libtpu is not installed.
  """
  devices = describe(topology)
  mesh = mesh_lib.make_mesh(config.mesh, devices)
  kind = devices[0].device_kind
  say(console, f"{topology}: {len(devices)} × {kind}; compiling")
  abstract = compiled_steps.abstract_model(config)
  params = nnx.to_pure_dict(nnx.state(abstract, nnx.Param))
  lines, _ = mesh_report.describe(config, params, mesh.shape)
  for line in lines:
    say(console, line)
  result = report(config, mesh)
  found, limit = result.found, result.limit
  if found is None:
    say(console, f"does not fit: {result.reason}")
    return 1
  console.print(rows("a device and step", _rows(result, found)))
  verdict = "it fits" if result.fits else "does not fit"
  known = f"of {limit / GIB:.0f} GiB" if limit else f"; {kind}: HBM not known"
  verdict = verdict if limit else "compiled"
  say(console, f"{verdict}: {found.memory / GIB:.3f} GiB {known}")
  return 0 if result.fits else 1


def report(config: RunConfig, mesh: jax.sharding.Mesh) -> Report:
  """Compile the step for a mesh whose devices need not be attached.

  Args:
    config: the run.
    mesh: the mesh; the run's `mesh` is not used.

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
  device = mesh.devices.flat[0]
  return Report(
    devices=mesh.size,
    kind=device.device_kind,
    limit=peaks.memory(device),
    peak=peaks.flops(device),
    parameters=parameter_count(compiled_steps.abstract_model(config)),
    tokens=config.batch * config.data.length,
    products=flops.of_jaxpr(traced.jaxpr) / mesh.size,
    found=found,
    reason=reason,
  )


def describe(topology: str) -> list[jax.Device]:
  """Return the devices of a slice, to compile for but not to compute on.

  Args:
    topology: the name of the slice, as `v5e:4x4`.

  Raises:
    ValueError: there is no such slice.
    NotImplementedError: libtpu is not installed.
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
  """Trace the training step for a mesh whose devices need not be attached."""
  with jax.set_mesh(mesh):
    steps = compiled_steps.make_steps(config, mesh)
    inputs = compiled_steps.step_inputs(config, steps)
    return steps.train_step.trace(*inputs)


def lower(traced: Any, mesh: jax.sharding.Mesh) -> Any:
  """Lower what `trace` returned."""
  with jax.set_mesh(mesh):
    return traced.lower()


def measure(compiled: Any, devices: int) -> Compiled:
  """Return what XLA reports about a compiled function.

  Args:
    compiled: what `lower(…).compile()` returned.
    devices: devices of its mesh.
  """
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
  def mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"

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
