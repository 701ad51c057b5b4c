"""Damage files at random: fields of JSON, and bytes of anything."""

import copy
import json
from pathlib import Path
import random
from typing import Any

_VALUES: list[Any] = [
  None,
  True,
  False,
  0,
  -1,
  1,
  2.0,
  0.5,
  2**31,
  2**63,
  -(2**63),
  10**400,
  1e308,
  float("inf"),
  float("nan"),
  "",
  "false",
  "1",
  "..",
  "../x",
  "/dev/null",
  "a\nb",
  "\ud800",
  "[bold]",
  [],
  [1, None],
  {},
  {"class": "os:path"},
  {"class": "train:RunConfig"},
]


def mutate(path: Path, chance: random.Random) -> str:
  """Damage a file, and return what was done to it."""
  if path.suffix in (".json", ".jsonl") and chance.random() < 0.7:
    done = _mutate_json(path, chance)
  else:
    done = _mutate_bytes(path, chance)
  return f"{path.name}: {done}"


def _mutate_json(path: Path, chance: random.Random) -> str:
  """Damage one field of a JSON file, or of one line of JSON lines."""
  lines = [path.read_text()]
  if path.suffix == ".jsonl":
    lines = lines[0].splitlines()
  number = chance.randrange(len(lines))
  data = json.loads(lines[number])
  places = list(_places(data))
  holder, key = chance.choice(places)
  old, kind = holder[key], chance.randrange(6)
  if kind == 0:
    del holder[key]
    done = f"{key!r} removed"
  elif kind == 1 and isinstance(holder, dict):
    holder[f"{key}s"] = holder.pop(key)
    done = f"{key!r} renamed"
  elif kind == 2:
    other, name = chance.choice(places)
    value = copy.deepcopy(other[name])
    holder[key] = value
    done = f"{key!r}={old!r:.40} → {value!r:.40} of {name!r}"
  elif kind == 3:
    value = _like(old, chance)
    holder[key] = value
    done = f"{key!r}={old!r:.40} → {value!r:.40}"
  else:
    value = chance.choice(_VALUES)
    holder[key] = value
    done = f"{key!r}={old!r:.40} → {value!r:.40}"
  lines[number] = json.dumps(data)
  path.write_text("\n".join(lines) + "\n")
  return done


def _like(value: Any, chance: random.Random) -> Any:
  """Return another value of the same type."""
  if isinstance(value, bool):
    return not value
  if isinstance(value, int):
    return value + chance.choice([-1000, -2, -1, 1, 2, 20])
  if isinstance(value, float):
    return value * chance.choice([-1, 0, 1e-9, 2, 1e9])
  if isinstance(value, str):
    return chance.choice([value[1:], value + "x", value.upper(), value * 2])
  nested: Any = value
  for _ in range(chance.choice([1, 50, 5000])):
    nested = [nested]
  # json.dumps cannot write what it could not read either.
  return nested if _depth(nested) < 500 else []


def _depth(value: Any) -> int:
  depth = 0
  while isinstance(value, list) and value:
    value, depth = value[0], depth + 1
  return depth


def _places(data: Any) -> list[tuple[Any, Any]]:
  """Return (holder, key) of each value in nested dicts and lists."""
  keys = data if isinstance(data, dict) else range(len(data))
  found = []
  for key in list(keys):
    found.append((data, key))
    if isinstance(data[key], (dict, list)):
      found += _places(data[key])
  return found


def _mutate_bytes(path: Path, chance: random.Random) -> str:
  data = bytearray(path.read_bytes())
  # Headers matter most, and they are short.
  end = len(data) if chance.random() < 0.5 else min(len(data), 128)
  place = chance.randrange(max(end, 1))
  length = min(chance.choice([1, 4, 16, 1000]), max(len(data) - place, 0))
  kind = chance.randrange(7)
  if kind == 0 and data:
    data[place] ^= 1 << chance.randrange(8)
    done = f"bit flipped at {place}"
  elif kind == 1:
    del data[place:]
    done = f"cut at {place}"
  elif kind == 2:
    data[place : place + length] = bytes(length)
    done = f"{length} zeros at {place}"
  elif kind == 3:
    data[place : place + length] = chance.randbytes(length)
    done = f"{length} random bytes at {place}"
  elif kind == 4:
    data[place:place] = chance.randbytes(length)
    done = f"{length} bytes more at {place}"
  elif kind == 5:
    data[place : place + length] = b""
    done = f"{length} bytes less at {place}"
  else:
    data = bytearray(chance.choice([b"", b"\xff" * 64, b"[" * 20_000, b"{}"]))
    done = f"replaced by {bytes(data[:4])!r}…"
  path.write_bytes(bytes(data))
  return done
