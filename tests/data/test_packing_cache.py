"""Test the cache of row plans."""

import logging
from pathlib import Path

import numpy as np
import pytest

from train.data.text.packing_cache import cached


def test_the_cache_makes_a_plan_once(tmp_path: Path, caplog) -> None:
  calls = []

  def make() -> dict[str, np.ndarray]:
    calls.append(1)
    return {"a": np.arange(5), "b": np.arange(3, dtype=np.int32)}

  for _ in range(2):
    found = cached({"lengths": "x"}, make, tmp_path)
    assert found["a"].tolist() == [0, 1, 2, 3, 4]
    assert found["b"].dtype == np.int32 and not found["a"].flags.writeable
  assert len(calls) == 1
  cached({"lengths": "y"}, make, tmp_path)
  assert len(calls) == 2 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("file", ["a.npy", "plan.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_plan_is_made_again(tmp_path, caplog, file, damage) -> None:
  make = lambda: {"a": np.arange(50)}
  cached({"k": 1}, make, tmp_path)
  (folder,) = tmp_path.iterdir()
  path = folder / file
  content = bytearray(path.read_bytes())
  content[-3] ^= 1
  if damage == "gone":
    path.unlink()
  else:
    path.write_bytes(content if damage == "flip" else content[:-9])
  with caplog.at_level(logging.WARNING):
    found = cached({"k": 1}, make, tmp_path)
  assert found["a"].tolist() == list(range(50))
  assert "is damaged and will be made again" in caplog.text
  assert [x.name for x in tmp_path.iterdir()] == [folder.name]


def test_a_failed_plan_leaves_nothing(tmp_path: Path) -> None:
  def make() -> dict[str, np.ndarray]:
    raise MemoryError("too long")

  with pytest.raises(MemoryError):
    cached({"k": 1}, make, tmp_path)
  assert list(tmp_path.iterdir()) == []
