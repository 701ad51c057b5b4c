"""Reading that does not wait for ever."""

from collections.abc import Callable
import threading
from typing import TypeVar

_T = TypeVar("_T")


class DataTimeout(TimeoutError):
  """A batch has not come in time; its thread still waits for it."""


def within(seconds: float | None, what: str, function: Callable[[], _T]) -> _T:
  """What the function returns or raises, if that comes in time.

  It runs in a thread, which nothing can stop: after a `DataTimeout` the process
  is fit to save and to end by `os._exit` alone.

  Args:
    seconds: how long; None waits for ever, in this thread.
    what: is waited for, for the message.
    function: takes nothing.

  Raises:
    DataTimeout: it has not come.
  """
  if seconds is None:
    return function()
  result: list[tuple[_T | None, BaseException | None]] = []

  def run() -> None:
    try:
      result.append((function(), None))
    except BaseException as error:  # noqa: BLE001
      result.append((None, error))

  thread = threading.Thread(target=run, name="read", daemon=True)
  thread.start()
  thread.join(seconds)
  if not result:
    raise DataTimeout(
      f"{what} has not come within {seconds:g} s (data.timeout): the data "
      "source hangs"
    )
  value, error = result[0]
  if error is not None:
    raise error
  return value
