"""Find the collectives of a compiled step: kind, bytes, and how often it runs.

The text of a compiled module has each collective once. A loop runs it as often
as its condition, `i < N`, and its body, `i + step`, say. With ring algorithms
over n devices and a result of R bytes, these bytes leave each device:

    all-reduce           2 (n − 1)/n · R
    all-gather             (n − 1)/n · R
    all-to-all             (n − 1)/n · R
    reduce-scatter         (n − 1) · R
    collective-permute     R
"""

from collections.abc import Iterator, Mapping
import dataclasses
import math
import re

KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
_BYTES = dict(pred=1, s8=1, u8=1, bf16=2, f16=2, s16=2, u16=2)
_BYTES |= dict(f32=4, s32=4, u32=4, f64=8, s64=8, u64=8)
_NAME = r"%?([\w.\-]+)"


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a module."""

  #: One of KINDS.
  kind: str
  #: Bytes of the result.
  size: int
  #: How often a step runs it.
  times: int
  #: How many devices take part.
  devices: int

  @property
  def moved(self) -> float:
    """Bytes that leave each device in a step."""
    others = self.devices - 1
    factor = {
      "all-reduce": 2 * others / self.devices,
      "reduce-scatter": others,
      "collective-permute": 1,
    }.get(self.kind, others / self.devices)
    return factor * self.size * self.times


def find(text: str, devices: int) -> Iterator[Collective]:
  """Yield each collective of a module's text.

  The TPU compiler writes a reduce-scatter as an all-reduce inside a computation
  `all-reduce-scatter…`, which cuts the result. A collective that is fused with
  computations appears in several of them, with the same channel. Elsewhere,
  different collectives may share a channel.

  Args:
    text: the optimised module, as XLA prints it.
    devices: devices of the mesh. All take part if the text names no groups.
  """
  bodies = _computations(text)
  times = _times(bodies)
  fused = set(re.findall(rf" fusion\(.*calls={_NAME}", text))
  seen: set[tuple[str, ...]] = set()
  for name, lines in bodies.items():
    for line in lines:
      found = re.search(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
      if found is None:
        continue
      if name in fused and "channel_id=" in line:
        one = _identity(line, found[1])
        if one in seen:
          continue
        seen.add(one)
      kind = found[2]
      size = _size(found[1], kind, found[3] is not None)
      taking_part = _taking_part(line, devices)
      if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
        kind, size = "reduce-scatter", size // taking_part
      yield Collective(kind, size, times.get(name, 1), taking_part)


def _identity(line: str, shapes: str) -> tuple[str, ...]:
  """Return what all appearances of a fused collective have in common."""
  channel = re.search(r"channel_id=(\d+)", line)
  source = re.search(r'op_name="([^"]*)"', line)
  found = [x[1] if x else "" for x in (channel, source)]
  return (*found, re.sub(r"\{.*?\}", "", shapes))


def _size(shapes: str, kind: str, is_started: bool) -> int:
  arrays = re.findall(r"([a-z]\w*)\[([\d,]*)\]", shapes)
  sizes = [
    _width(dtype) * math.prod(map(int, shape.split(",")))
    for dtype, shape in arrays
    if shape  # scalars of an asynchronous one are its bookkeeping
  ] or [4]
  if is_started and kind in ("all-gather", "collective-permute"):
    sizes = sizes[len(sizes) // 2 :]  # the first half is what goes in
  return sum(sizes)


def _width(dtype: str) -> int:
  if dtype not in _BYTES:
    raise NotImplementedError(
      f"a collective of dtype {dtype}: expected one of {tuple(_BYTES)}"
    )
  return _BYTES[dtype]


def _taking_part(line: str, devices: int) -> int:
  """Return the size of a group: `{{0,1},…}`, `[8,2]<=[…]` or mesh axes."""
  listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
  if listed is not None:
    return listed[1].count(",") + 1
  shaped = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
  if shaped is not None:
    return int(shaped[1])
  named = re.search(r"replica_groups=mesh\[(.*?)\] *\{(.*?)\}", line)
  if named is not None:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    axes = re.findall(r"'(\w+)'", named[2])
    return math.prod(int(sizes[axis]) for axis in axes)
  return devices


def _computations(text: str) -> dict[str, list[str]]:
  """Return the lines of each computation, by its name."""
  bodies: dict[str, list[str]] = {}
  lines: list[str] = []
  for line in text.splitlines():
    head = re.match(rf"(?:ENTRY )?{_NAME} (?:\(|\{{)", line)
    if head is not None:
      lines = bodies.setdefault(head[1], [])
    lines.append(line)
  return bodies


def _times(bodies: Mapping[str, list[str]]) -> dict[str, int]:
  """Return how often a step runs each computation."""
  calls: dict[str, list[tuple[str, int]]] = {name: [] for name in bodies}
  for name, lines in bodies.items():
    for line in lines:
      loop = re.search(rf" while\(.*condition={_NAME}, body={_NAME}", line)
      trips = 1 if loop is None else _trips(line, bodies, loop[1], loop[2])
      called = re.findall(
        rf"(?:calls|body|condition|to_apply)={_NAME}", line
      ) + _branches(line)
      calls[name] += [(x, trips) for x in called if x in bodies]
  called = {x for several in calls.values() for x, _ in several}
  times: dict[str, int] = {}

  def run(name: str, count: int) -> None:
    times[name] = times.get(name, 0) + count
    for inner, trips in calls[name]:
      run(inner, count * trips)

  for name in bodies:
    if name not in called:
      run(name, 1)
  return times


def _branches(line: str) -> list[str]:
  found = re.search(r"branch_computations=\{(.*?)\}", line)
  return [] if found is None else re.findall(_NAME, found[1])


def _trips(
  line: str, bodies: Mapping[str, list[str]], condition: str, body: str
) -> int:
  """Return how often a loop runs; 1 where its text does not say."""
  known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
  if known is not None:
    return int(known[1])
  test = _definitions(bodies.get(condition, []))
  compared = re.search(
    rf" compare\({_NAME}, {_NAME}\), direction=LT", test.get("ROOT", "")
  )
  if compared is None:
    return 1
  index = re.search(r"index=(\d+)", test.get(compared[1], ""))
  limit = _constant(test.get(compared[2], ""))
  if index is None or limit is None:
    return 1
  inner = _definitions(bodies.get(body, []))
  results = re.search(r" tuple\((.*?)\)", inner.get("ROOT", ""))
  step = None
  if results is not None:
    next_value = re.findall(_NAME, re.sub(r"/\*.*?\*/", "", results[1]))
    added = re.search(
      rf" add\({_NAME}, {_NAME}\)", inner.get(next_value[int(index[1])], "")
    )
    if added is not None:
      steps = [_constant(inner.get(x, "")) for x in added.groups()]
      step = next((x for x in steps if x), None)
  return -(-limit // (step or 1))


def _constant(line: str) -> int | None:
  found = re.search(r" constant\((\d+)\)", line)
  return None if found is None else int(found[1])


def _definitions(lines: list[str]) -> dict[str, str]:
  """Return each line by the name that it defines; the result also as ROOT."""
  found = {}
  for line in lines:
    defined = re.match(rf"\s*(ROOT )?{_NAME} = ", line)
    if defined is not None:
      found[defined[2]] = line
      if defined[1]:
        found["ROOT"] = line
  return found
