"""Run training steps as the trainer does, and measure their idle time."""

from collections.abc import Callable, Iterator
import itertools
from pathlib import Path
import statistics
import tempfile
import time
from typing import Any

import jax
import numpy as np

from benchmarks.train_step.cases import Case
from train.devices import batch_sharding, peaks


class Runner:
  """Runs steps over random tokens, as the trainer does."""

  def __init__(
    self,
    step: Any,
    state: Any,
    shape: tuple[int, int],
    vocab_size: int,
    *,
    copies: int = 1,
    put: Callable[[Any], Any] = jax.device_put,
    key: jax.Array | None = None,
  ):
    """Make four random batches, which the steps take in turn.

    Args:
      step: the compiled training step.
      state: the training state, which the steps consume.
      shape: (rows, length) of the batch of one device.
      vocab_size: random tokens are below it.
      copies: how often the rows are repeated in the batch: once per device.
      put: moves a batch to the devices.
      key: the key of dropout, placed as `step` expects it. None makes one on
        the default device.
    """
    self._step, self._state = step, state
    self._key = jax.random.key(1) if key is None else key
    self._pending = None
    self.finite = True
    rng = np.random.default_rng(0)
    rows, length = shape
    tokens_4BW = rng.integers(0, vocab_size, (4, rows, length + 1), np.int32)
    tokens_4BW = np.tile(tokens_4BW, (1, copies, 1))
    ones = np.ones((copies * rows, length), np.float32)
    batches = [
      dict(tokens=x[:, :-1].copy(), targets=x[:, 1:].copy(), weights=ones)
      for x in tokens_4BW
    ]
    self._batches = batch_sharding.put_ahead(itertools.cycle(batches), put)

  def first_loss(self) -> float:
    """Run one step and return its loss."""
    batch = next(self._batches)
    self._state, metrics = self._step(self._state, batch, self._key)
    return float(metrics["loss"])

  def steps(self, count: int) -> float:
    """Run `count` steps and return their seconds, until the last metrics."""
    begin = time.perf_counter()
    for _ in range(count):
      batch = next(self._batches)
      self._state, metrics = self._step(self._state, batch, self._key)
      self._settle()
      self._pending = metrics
    self._settle()
    return time.perf_counter() - begin

  def _settle(self) -> None:
    if self._pending is not None:
      found = jax.device_get(self._pending)
      self.finite &= bool(np.isfinite(found["loss"]))
      self._pending = None


def times(
  run: Runner, case: Case, args, parameters: int, devices: int = 1
) -> dict[str, Any]:
  """Measure rounds of steps with `case.rows` rows on each device.

  Returns:
    Fields of a result's row: times, tokens per second, MFU.

  Raises:
    SystemExit: a loss was not finite.
  """
  each = max(int(args.seconds / args.rounds / run.steps(1)), 2)
  seconds = [run.steps(each) / each for _ in range(args.rounds)]
  if not run.finite:
    raise SystemExit(f"a loss is not finite, not timed: {case.row}")
  rate = devices * case.rows * case.length / statistics.median(seconds)
  mfu = peaks.mfu(rate, parameters, jax.devices()[0], devices)
  return {
    "step_ms": round(1e3 * statistics.median(seconds), 2),
    "step_ms_of_rounds": [round(1e3 * x, 2) for x in seconds],
    "steps": each * args.rounds,
    "tokens_per_second": round(rate),
    "mfu": mfu and round(mfu, 4),
  }


def idle_share(
  run: Callable[[], object], keep: Path | None = None
) -> float | None:
  """Return the device's idle share between the first and last kernel of `run`.

  Copies count as work. Waiting before the first kernel and after the last one
  does not count, because a longer run has neither.

  Args:
    run: the function to trace. It returns when the device has finished.
    keep: a folder that keeps the trace; None deletes it.

  Returns:
    A share from 0 to 1; None if the trace shows no device, as on a CPU.
  """
  with tempfile.TemporaryDirectory() as temporary:
    folder = Path(keep or temporary)
    jax.profiler.start_trace(str(folder))
    run()
    jax.profiler.stop_trace()
    newest = max(folder.rglob("*.xplane.pb"), key=lambda x: x.stat().st_mtime)
    return idle_between_kernels(list(_spans(newest)))


def idle_between_kernels(
  spans: list[tuple[float, float, bool]],
) -> float | None:
  """Return the idle share of spans (start, stop, is a kernel), in any order."""
  kernels = [(start, stop) for start, stop, is_kernel in spans if is_kernel]
  if not kernels:
    return None
  begin = end = min(start for start, _ in kernels)
  last = max(stop for _, stop in kernels)
  idle = 0.0
  for start, stop, _ in sorted(spans):
    idle += max(min(start, last) - end, 0.0)
    end = max(end, stop)
  return round(idle / (last - begin), 5)


def _spans(path: Path) -> Iterator[tuple[float, float, bool]]:
  """Yield (start, stop, computes) of each operation on the device, in ns.

  An operation that does not compute is a copy between host and device.
  """
  data = jax.profiler.ProfileData.from_file(str(path))
  for plane in data.planes:
    if not plane.name.startswith("/device:"):
      continue
    for line in plane.lines:
      # A GPU has a line per stream, named after its work; a TPU has "XLA Ops".
      if line.name.startswith("Stream") or line.name == "XLA Ops":
        computes = line.name == "XLA Ops" or "Compute" in line.name
        for event in line.events:
          yield event.start_ns, event.start_ns + event.duration_ns, computes
