"""Count the programs that jax compiles."""

import collections
from collections.abc import Iterator
import contextlib

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations() -> Iterator[collections.Counter]:
  """Yield how often each program was compiled in the block, by its name."""
  count = collections.Counter()

  def listen(event: str, seconds: float, **fields) -> None:
    if event == _EVENT:
      count[fields["fun_name"]] += 1

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield count
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
