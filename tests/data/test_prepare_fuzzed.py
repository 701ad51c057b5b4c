"""Test mutated tokenizers, plans and records: they are mended or named."""

import copy
import json
from pathlib import Path
import random
from typing import Any

from prepare_cases import records, run, tree, write_formats
import pytest

from train.data.prepare import prepare_dataset, shard, tokenizer as tokenize
from train.data.prepare.shard import PrepareError

_ODD = (
  *(None, True, -1, 0, 1, 3.5, 2**31, 2**63, 2**70, 1e400),
  *("", "x", "</s>", "\ufdd0", [], [0], ["a b"], {}, {"a": 1}, [[[]]]),
)


def _places(value: Any, path: tuple = ()) -> list[tuple]:
  """Return the path of each value inside JSON data."""
  if isinstance(value, dict):
    inner = list(value.items())
  elif isinstance(value, list):
    inner = list(enumerate(value))
  else:
    inner = []
  return ([path] if path else []) + [
    place for key, x in inner for place in _places(x, (*path, key))
  ]


def _mutated(value: Any, seeded: random.Random) -> Any:
  """Replace, remove or double one or two values inside JSON data."""
  value = copy.deepcopy(value)
  for _ in range(seeded.choice((1, 1, 2))):
    places = _places(value)
    if not places:
      break
    # Half of the changes are near the top, where the structure is.
    top = [x for x in places if len(x) < 3]
    *path, last = seeded.choice(top if seeded.random() < 0.5 else places)
    at = value
    for key in path:
      at = at[key]
    match seeded.randrange(4):
      case 0:
        del at[last]
      case 1 if isinstance(at, list):
        at.insert(last, copy.deepcopy(at[last]))
      case _:
        at[last] = seeded.choice(_ODD)
  return value


def _check_tokenizers(tmp_path: Path, count: int) -> int:
  """Load mutated tokenizers and encode with them; return how many worked."""
  texts = [x["text"] for x in records(9)]
  whole = json.loads(tokenize.train_bpe(texts, 270))
  file, seeded, worked = tmp_path / "t.json", random.Random(count), 0
  for _ in range(count):
    file.write_text(json.dumps(_mutated(whole, seeded)))
    try:
      found = tokenize.load(str(file))
      tokens = found.encode([*texts, "a <|endoftext|> b"])
      assert all(found.spec.eos not in x for x in tokens)
      found.decode(tokens[0])
      worked += 1
    except ValueError:
      continue
  return worked


def test_mutated_tokenizers_are_named(tmp_path, capfd):
  assert 3 < _check_tokenizers(tmp_path, 60) < 60
  capfd.readouterr()  # the library prints its panics


@pytest.mark.slow
def test_a_thousand_mutated_tokenizers_are_named(tmp_path, capfd):
  assert 30 < _check_tokenizers(tmp_path, 1000) < 1000
  capfd.readouterr()


def _make_here(jobs, planned, *_) -> None:
  """Make shards in this process, which is faster than starting workers."""
  for job in jobs:
    nothing = lambda _: None
    shard.write_shard(job, planned.load(), nothing, lambda: False)


def _check_records(tmp_path: Path, monkeypatch, count: int) -> tuple[int, int]:
  """Mutate JSON files of a data set, and continue it.

  Returns:
    How often the data set was mended, and how often an error named the file.
  """
  monkeypatch.setattr(prepare_dataset, "run_jobs", _make_here)
  folder, out = tmp_path / "in", tmp_path / "out"
  write_formats(folder, 3)
  run([folder], out)
  whole = tree(out)
  names = [name for name in whole if name.endswith(".json")]
  seeded, mended, named = random.Random(count), 0, 0
  for _ in range(count):
    name = seeded.choice(names)
    data = _mutated(json.loads(whole[name]), seeded)
    if name.startswith("prepare/shard") and isinstance(data, dict):
      data.setdefault("record_sha256", "")  # earlier versions had none
    text = json.dumps(data).encode()
    if seeded.random() < 0.2:
      text = text[: seeded.randrange(len(text))]
    (out / name).write_bytes(text)
    try:
      run([folder], out)
      found = tree(out)
      assert found.pop(name) == whole[name] or json.loads(text) == json.loads(
        whole[name]
      )
      assert found == {x: y for x, y in whole.items() if x != name}
      mended += 1
    except (ValueError, PrepareError) as error:
      assert str(out) in str(error) and "plan" in name
      named += 1
    (out / name).write_bytes(whole[name])
  assert tree(out) == whole
  return mended, named


def test_mutated_records_are_mended_or_named(tmp_path, monkeypatch):
  assert min(_check_records(tmp_path, monkeypatch, 40)) > 3


@pytest.mark.slow
def test_a_thousand_mutated_records_are_mended_or_named(tmp_path, monkeypatch):
  assert min(_check_records(tmp_path, monkeypatch, 1000)) > 100
