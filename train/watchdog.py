"""Watch what a run does: how productive it is, and whether it hangs.

A process that hangs ends with a line that says where. A hang cannot be undone
from inside: a collective that waits for another process, a lock that is held, a
disk that does not answer. The last checkpoint is whole, so that ending the
process loses less than waiting does.
"""

import threading
import time
from typing import Self

from train.devices import processes
from train.devices.peers import end_process

#: The exit code of a process that made no progress within the limit.
EXIT_HUNG = 4

_LEFT = (
  "every checkpoint is whole, and `rebased resume` continues from the newest, "
  "if there is one"
)


class Watchdog:
  """Watch that a run makes progress while the context is open.

  Time counts only while this process runs, so that one that was stopped with
  SIGSTOP and continued, or slept with its host, does not count as hung.

  Args:
    limit: seconds without progress after which the process ends. None: never.
    left: what the process leaves behind, as the end of its last line.

  Raises:
    ValueError: the limit is not above 0.
  """

  def __init__(self, limit: float | None = None, left: str = _LEFT):
    if limit is not None and not limit > 0:
      raise ValueError(
        f"step_timeout={limit!r}: expected None or a number of seconds above 0"
      )
    self._limit, self._left = limit, left
    self._phase, self._part = "start", ""
    self._idle = 0.0  # seconds since the last progress
    self._begin = self._since = self._phase_since = time.perf_counter()
    self._training = False  # whether the phase is training
    self._trained = 0.0  # seconds of the earlier phases of training
    self._closed = threading.Event()

  def beat(self, phase: str, *, part: str = "", training: bool = False) -> None:
    """Note progress.

    Args:
      phase: what the run does from now on, such as "step 7".
      part: how far the phase is, such as "batch 3 of 9".
      training: whether that is a step, and not what surrounds the steps.
    """
    now = time.perf_counter()
    if phase != self._phase:
      self._phase_since = now
    if self._training:
      self._trained += now - self._since
    self._training, self._since = training, now
    self._phase, self._part, self._idle = phase, part, 0.0

  def doing(self) -> str | None:
    """Return what the run does and for how long; None in a step of training."""
    if self._training:
      return None
    seconds = time.perf_counter() - self._phase_since
    part = f", {self._part}" if self._part else ""
    return f"{self._phase}{part}: {seconds:.0f} s so far"

  def goodput(self) -> float:
    """Return the share of the time since the start that steps took, 0 to 1."""
    self.beat(self._phase, part=self._part, training=self._training)
    return self._trained / max(self._since - self._begin, 1e-9)

  def __enter__(self) -> Self:
    if self._limit is not None:
      threading.Thread(
        target=self._watch, args=(self._limit,), name="watchdog", daemon=True
      ).start()
    return self

  def __exit__(self, *_: object) -> None:
    self._closed.set()

  def _watch(self, limit: float) -> None:
    tick, then = min(1.0, limit / 10), time.monotonic()
    while not self._closed.wait(tick):
      # A tick that comes far too late is one in which the process was stopped.
      now = time.monotonic()
      self._idle += min(now - then, 2 * tick)
      then = now
      if self._idle >= limit:
        processes.say_end(EXIT_HUNG)
        end_process(
          f"no progress for {limit:g} s (--step-timeout) in: {self._phase}; "
          f"{self._left}",
          EXIT_HUNG,
        )
