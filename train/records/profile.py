"""A trace of some steps, by JAX's profiler, in the run folder."""

from typing import Any

from etils import epath
import jax

from train.config import ProfileConfig


class Profile:
  """Watches the steps of a window; a context manager, which ends a trace.

  The trace holds whole steps: it begins and ends when nothing is under way.
  """

  def __init__(self, config: ProfileConfig, folder: epath.Path):
    self._first = config.start
    self._stop = config.start + config.steps
    self._folder = folder / "profile"
    self._active = False

  def before(self, step: int, state: Any) -> None:
    """To be called before `step` is dispatched, with the state it takes."""
    inside = self._first <= step < self._stop
    if inside == self._active:
      return
    jax.block_until_ready(state)
    if inside:
      jax.profiler.start_trace(str(self._folder))
    else:
      jax.profiler.stop_trace()
    self._active = inside

  def __enter__(self) -> "Profile":
    return self

  def __exit__(self, *_) -> None:
    if self._active:
      jax.profiler.stop_trace()
      self._active = False
