"""A trace of some steps by JAX's profiler, written to the run folder."""

from typing import Any, Self

from etils import epath
import jax

from train.config import ProfileConfig


class Profile:
  """Trace a window of steps; a context manager, which ends the trace.

  The trace holds whole steps: it begins and ends when no step is running.

  Args:
    config: the steps to trace.
    folder: the run's folder; the trace is in its folder `profile`.
  """

  def __init__(self, config: ProfileConfig, folder: epath.Path):
    self._first = config.start
    self._stop = config.start + config.steps
    self._folder = folder / "profile"
    self._active = False

  def before(self, step: int, state: Any) -> None:
    """Start or stop the trace; call it before a step is dispatched.

    Args:
      step: the step that comes next.
      state: the state that it takes.
    """
    inside = self._first <= step < self._stop
    if inside == self._active:
      return
    jax.block_until_ready(state)
    if inside:
      jax.profiler.start_trace(str(self._folder))
    else:
      jax.profiler.stop_trace()
    self._active = inside

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    if self._active:
      jax.profiler.stop_trace()
      self._active = False
