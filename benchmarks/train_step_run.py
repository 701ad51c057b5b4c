"""Steps as the trainer makes them, and the time the device is idle in them."""

from collections.abc import Callable, Iterator
import itertools
from pathlib import Path
import statistics
import tempfile
import time
from typing import Any

import jax
import numpy as np
from train_step_cases import Case

from train.devices import peaks, sharding


class Runner:
  """Steps one after the other, as the trainer makes them."""

  def __init__(
    self,
    step: Any,
    state: Any,
    shape: tuple[int, int],
    words: int,
    *,
    copies: int = 1,
    put: Callable[[Any], Any] = jax.device_put,
    key: jax.Array | None = None,
  ):
    """Steps over random tokens.

    Args:
      step: compiled.
      state: which the steps consume.
      shape: rows and length of the batch.
      words: of the vocabulary.
      copies: of the rows, one behind the other: one a device.
      put: a batch onto the devices.
      key: of the dropout, where `step` takes it; None: on one device.
    """
    self._step, self._state = step, state
    self._key = jax.random.key(1) if key is None else key
    self._pending = None
    self.finite = True
    rng = np.random.default_rng(0)
    rows, length = shape
    tokens_4BW = rng.integers(0, words, (4, rows, length + 1), np.int32)
    tokens_4BW = np.tile(tokens_4BW, (1, copies, 1))
    ones = np.ones((copies * rows, length), np.float32)
    batches = [
      dict(tokens=x[:, :-1].copy(), targets=x[:, 1:].copy(), weights=ones)
      for x in tokens_4BW
    ]
    self._batches = sharding.put_ahead(itertools.cycle(batches), put)

  def first_loss(self) -> float:
    """The loss of one step."""
    batch = next(self._batches)
    self._state, metrics = self._step(self._state, batch, self._key)
    return float(metrics["loss"])

  def steps(self, count: int) -> float:
    """Seconds of so many steps, the last one's metrics read."""
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
  """Times of rounds of steps, `case.rows` on each device, for a result's row.

  Raises SystemExit where a loss was not finite.
  """
  each = max(int(args.seconds / args.rounds / run.steps(1)), 2)
  seconds = [run.steps(each) / each for _ in range(args.rounds)]
  if not run.finite:
    raise SystemExit(f"a loss is not finite, no times: {case.row}")
  rate = devices * case.rows * case.length / statistics.median(seconds)
  mfu = peaks.mfu(rate, parameters, jax.devices()[0].device_kind, devices)
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
  """The idle share between the first kernel of `run` and its last.

  Copies count as work, but no wait for the first batch, or of the last results,
  counts as idle: steps that go on have neither. None where the trace has no
  lines of a device, as on a CPU.

  Args:
    run: what is traced; it returns when the device has done it.
    keep: a folder for the trace; None: it is not kept.
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
  """The idle share of (start, stop, is a kernel), by any order."""
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
  """(start, stop) of each operation on the device, and whether it computes.

  In nanoseconds. What does not is a copy between the host and the device.
  """
  data = jax.profiler.ProfileData.from_file(str(path))
  for plane in data.planes:
    if not plane.name.startswith("/device:"):
      continue
    for line in plane.lines:
      # Of a GPU each stream, named by what it has; of a TPU the operations.
      if line.name.startswith("Stream") or line.name == "XLA Ops":
        computes = line.name == "XLA Ops" or "Compute" in line.name
        for event in line.events:
          yield event.start_ns, event.start_ns + event.duration_ns, computes
