"""The TPU kernels' sizes, by generation: files that say what chose them."""

import functools
import json
from pathlib import Path

from pallas_kernels import devices

_LANES = 128


@functools.cache
def table(generation: str) -> dict:
  """`tuned/tpu_<generation>.json`."""
  path = Path(__file__).parents[1] / "tuned" / f"tpu_{generation}.json"
  return json.loads(path.read_text())


def sizes(kernel: str, F: int, T: int) -> tuple[int, int, int]:
  """Tokens of a chunk, a span and a block, on the TPU that the call runs on.

  Smaller than in the file where the row is short, or more than a quarter of
  the work would be behind its end.
  """
  found = table(devices.tpu_generation())["sizes"][kernel][str(F)]
  up = lambda x, to: -(-x // to) * to
  chunk = min(found["chunk"], up(T, _LANES))
  span = min(found["span"], up(T, chunk))
  while span % (2 * chunk) == 0 and 4 * up(T, span) > 5 * T:
    span //= 2
  steps = -(-T // found["block"])
  return chunk, span, up(-(-T // steps), span)
