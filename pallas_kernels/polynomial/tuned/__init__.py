"""The tables of tuned sizes, one a card, and what is read from them.

A table is a JSON file of this package, written by `pallas_kernels.tuning`:

  device   the card's name, as jax has it; the table is for no other
  jax      the version that it was measured with; null: nothing was measured
  date     of the measurement, or null
  default  programs and chunks where no entry is near, and how they were timed
  entries  the fields of `Entry`, one for each shape that was measured

An entry counts for shapes within a factor of two of its own in batch × heads
and in T, of its own F, P (both rounded up to 16) and kind of coefficients; the
nearest one of several. A card without a table has `DEFAULT`.
"""

from collections.abc import Iterator
import contextlib
import contextvars
import dataclasses
import functools
from importlib import resources
import json
import math

from pallas_kernels import devices

# As the kernels take them: tokens of a chunk, values of a program.
CHUNK, WIDTH = 64, 64
NOT_MEASURED = "default, not measured"
_IMPLEMENTATIONS = ("gpu", "xla", "reference")


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What the kernels leave free.

  programs: how many programs time is cut for.
  chunks: the fewest chunks of a slice of time; the kernels take 8 at least.

  Raises:
    ValueError: a size is not a whole number in its range.
  """

  programs: int
  chunks: int

  def __post_init__(self):
    for name, least in (("programs", 1), ("chunks", 8)):
      value = getattr(self, name)
      if type(value) is not int or value < least:
        raise ValueError(f"{name}={value!r}: expected a whole number ≥ {least}")


# Two programs on each of an H100's 132 multiprocessors.
DEFAULT = Sizes(264, 8)


@dataclasses.dataclass(frozen=True)
class Shape:
  """What an entry is looked up by: sizes, heads = batch × heads."""

  heads: int
  T: int
  F: int
  P: int
  square: bool  # whether sim is the square alone

  def __post_init__(self):
    for name in ("heads", "T", "F", "P"):
      value = getattr(self, name)
      if type(value) is not int or value < 1:
        raise ValueError(f"{name}={value!r}: expected a whole number ≥ 1")
    if type(self.square) is not bool:
      raise ValueError(f"square={self.square!r}: expected true or false")

  def programs(self, sizes: Sizes) -> int:
    """How many programs its time is cut for."""
    total = -(-self.T // CHUNK)
    return min(sizes.programs, self.walks * max(1, total // sizes.chunks))

  @property
  def walks(self) -> int:
    """Programs of a slice of time: one a head, and a tile of its values."""
    return self.heads * -(-self.P // WIDTH)

  def distance(self, other: "Shape") -> float | None:
    """In doublings; None: the one says nothing of the other."""
    kind = lambda x: (-(-x.F // 16), -(-x.P // 16), x.square)
    if kind(self) != kind(other):
      return None
    steps = [
      abs(math.log2(a / b))
      for a, b in ((self.heads, other.heads), (self.T, other.T))
    ]
    return sum(steps) if max(steps) <= 1 else None


@dataclasses.dataclass(frozen=True)
class Entry:
  """One shape that was measured.

  name: of the shape.
  implementation: the fastest of those in `ms`.
  ms: milliseconds of a forward with its backward, by what ran.
  timed: how.
  """

  name: str
  shape: Shape
  sizes: Sizes
  implementation: str
  ms: dict[str, float]
  timed: str

  def __post_init__(self):
    for field in ("name", "timed"):
      if not isinstance(getattr(self, field), str) or not getattr(self, field):
        raise ValueError(f"{field}={getattr(self, field)!r}: expected a text")
    if self.implementation not in _IMPLEMENTATIONS:
      raise ValueError(
        f"implementation={self.implementation!r}: expected one of "
        f"{_IMPLEMENTATIONS}"
      )
    numbers = self.ms.values() if isinstance(self.ms, dict) else [None]
    if not all(type(x) in (int, float) and 0 < x < math.inf for x in numbers):
      raise ValueError(f"ms={self.ms!r}: expected positive numbers by name")


@dataclasses.dataclass(frozen=True)
class Table:
  """What one card's file holds."""

  device: str
  jax: str | None = None
  date: str | None = None
  default: Sizes = DEFAULT
  default_timed: str = NOT_MEASURED
  entries: tuple[Entry, ...] = ()

  def nearest(self, shape: Shape) -> Entry | None:
    """The entry that counts for this shape."""
    near = [(entry.shape.distance(shape), entry) for entry in self.entries]
    near = [pair for pair in near if pair[0] is not None]
    return min(near, key=lambda pair: pair[0])[1] if near else None

  def sizes(self, shape: Shape) -> Sizes:
    entry = self.nearest(shape)
    return self.default if entry is None else entry.sizes

  def implementation(self, shape: Shape) -> str:
    """The fastest one of a call that the kernels can do."""
    entry = self.nearest(shape)
    return "gpu" if entry is None else entry.implementation


def dump(table: Table) -> str:
  """The table as JSON; `parse` reads it back."""
  entries = []
  for entry in table.entries:
    flat = dataclasses.asdict(entry)
    entries.append(
      {"name": flat["name"], **flat.pop("shape"), **flat.pop("sizes"), **flat}
    )
  default = dataclasses.asdict(table.default) | {"timed": table.default_timed}
  result = {
    "device": table.device,
    "jax": table.jax,
    "date": table.date,
    "default": default,
    "entries": entries,
  }
  return json.dumps(result, indent=1) + "\n"


def parse(text: str, where: str) -> Table:
  """The table that `text` holds.

  Raises:
    ValueError: it is no table; the message starts with `where`.
  """
  try:
    return _table(json.loads(text))
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error


def _table(data) -> Table:
  _keys(data, ("device", "jax", "date", "default", "entries"), "the table")
  for field in ("device", "jax", "date"):
    value = data[field]
    if not isinstance(value, str) and (field == "device" or value is not None):
      raise ValueError(f"{field}={value!r}: expected a text")
  sizes = [field.name for field in dataclasses.fields(Sizes)]
  _keys(data["default"], (*sizes, "timed"), "default")
  timed = data["default"]["timed"]
  if not isinstance(timed, str):
    raise ValueError(f"default.timed={timed!r}: expected a text")
  if not isinstance(data["entries"], list):
    raise ValueError(f"entries={data['entries']!r}: expected a list")
  entries = tuple(
    _entry(entry, f"entries[{i}]") for i, entry in enumerate(data["entries"])
  )
  default = Sizes(*(data["default"][name] for name in sizes))
  head = (data[field] for field in ("device", "jax", "date"))
  return Table(*head, default, timed, entries)


def _entry(data, where: str) -> Entry:
  shape, sizes = (
    [field.name for field in dataclasses.fields(kind)]
    for kind in (Shape, Sizes)
  )
  rest = ("implementation", "ms", "timed")
  _keys(data, ("name", *shape, *sizes, *rest), where)
  try:
    return Entry(
      data["name"],
      Shape(*(data[name] for name in shape)),
      Sizes(*(data[name] for name in sizes)),
      *(data[name] for name in rest),
    )
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error


def _keys(data, expected: tuple[str, ...], where: str) -> None:
  if not isinstance(data, dict) or set(data) != set(expected):
    found = sorted(data) if isinstance(data, dict) else data
    raise ValueError(f"{where} has {found!r}: expected the keys {expected}")


def file_name(device: str) -> str:
  """Of a card's table: "NVIDIA H100 80GB HBM3" has h100.json."""
  words = device.removeprefix("NVIDIA ").lower().split()
  name = "".join(c for c in words[0] if c.isalnum()) if words else ""
  if not name:
    raise ValueError(f"device={device!r}: expected a card's name")
  return f"{name}.json"


@functools.cache
def of_device(device: str) -> Table:
  """The card's table; the defaults where there is none, or another card's.

  Raises:
    ValueError: the file is no table.
  """
  name = file_name(device)
  file = resources.files(__name__) / name
  if not file.is_file():
    return Table(device)
  table = parse(file.read_text(encoding="utf-8"), f"tuned/{name}")
  return table if table.device == device else Table(device)


_chosen: contextvars.ContextVar[Table | None] = contextvars.ContextVar(
  "chosen", default=None
)


@contextlib.contextmanager
def using(table: Table) -> Iterator[None]:
  """Traces with this table; what jax has traced before keeps its own."""
  token = _chosen.set(table)
  try:
    yield
  finally:
    _chosen.reset(token)


def here() -> Table:
  """The table of `using`, or of this process's card."""
  chosen = _chosen.get()
  return of_device(devices.device_kind()) if chosen is None else chosen
