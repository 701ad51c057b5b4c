"""A damaged checkpoint gives an older one or an error, never wrong values."""

from pathlib import Path
import shutil

from checkpoint_cases import (
  META,
  abstract,
  bits,
  fill,
  make_state,
  names,
)
import jax
import numpy as np
import pytest

from train.checkpoint import orbax_storage as storage
from train.checkpoint.checkpoints import (
  CheckpointError,
  Checkpoints,
  NoCheckpointError,
  read_meta,
  restore_params,
)
from train.checkpoint.verify import flatten

# Threads of a failed read may still complain after it has returned.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)


def _drop(path: Path) -> None:
  path.unlink()


def _halve(path: Path) -> None:
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 0x10
  path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [_drop, _halve, _flip])
def test_damage_to_any_file_never_gives_wrong_values(
  tmp_path: Path, damage, caplog
) -> None:
  fill(tmp_path / "whole")
  newest = tmp_path / "whole" / "2"
  files = [p.relative_to(newest) for p in newest.rglob("*") if p.is_file()]
  assert len(files) > 8
  fell_back = set()
  for file in files:
    run = tmp_path / "run"
    shutil.copytree(tmp_path / "whole", run)
    damage(run / "2" / file)
    caplog.clear()
    with Checkpoints(run) as checkpoints:
      restored = checkpoints.restore(abstract(make_state(0)))
      assert bits(restored.state) == bits(make_state(restored.step)), file
      assert restored.meta == {**META, "saved": restored.step}
      if restored.broken:
        fell_back.add(file.name if file.name.isidentifier() else file.parts[0])
        _check_fallback(run, checkpoints, restored, caplog)
    shutil.rmtree(run)
  assert "state" in fell_back or "d" in fell_back
  assert "record" in fell_back


def _check_fallback(run: Path, checkpoints, restored, caplog) -> None:
  (broken,) = restored.broken
  assert (restored.step, broken.step) == (1, 2)
  assert "unreadable" in caplog.text
  assert names(run) == {"1", "2.corrupt"} and broken.kept_as == "2.corrupt"
  assert checkpoints.latest() == 1
  checkpoints.save(2, make_state(22), {})
  assert checkpoints.steps() == [1, 2]
  again = checkpoints.restore(abstract(make_state(0)))
  assert again.step == 2 and bits(again.state) == bits(make_state(22))


def test_a_flipped_bit_in_any_part_of_the_data_is_found(tmp_path: Path) -> None:
  fill(tmp_path, (1,))
  data = max(tmp_path.rglob("d/*"), key=lambda path: path.stat().st_size)
  whole = data.read_bytes()
  target = abstract(make_state(0)["params"])
  outcomes = {"right": 0, "found": 0}
  for place in range(0, len(whole), len(whole) // 40):
    data.write_bytes(
      whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :]
    )
    try:
      _, params = restore_params(tmp_path, target)
      assert bits(params) == bits(make_state(1)["params"])
      outcomes["right"] += 1
    except CheckpointError as error:
      assert "no readable checkpoint" in str(error)
      outcomes["found"] += 1
  assert outcomes["found"] > 4, outcomes


def _changed(leaf: jax.Array) -> jax.Array:
  """Return an array with its last element's lowest bit flipped."""
  host = np.array(leaf)
  data = host.reshape(-1).view(np.uint8)
  data[-host.itemsize] ^= 1
  return jax.device_put(host, leaf.sharding)


def test_a_wrong_value_of_any_array_is_found(
  tmp_path: Path, monkeypatch
) -> None:
  """The optimiser's state, the step and the key are arrays as well."""
  fill(tmp_path, (1,))
  whole = flatten(make_state(1))
  assert len(whole) == 10
  load, wrong = storage.load, ""

  def load_wrong(path, name, target, **options):
    found = load(path, name, target, **options)
    if name == "record":
      return found
    *parents, last = wrong.split("/")
    place = found
    for parent in parents:
      place = place[parent]
    place[last] = _changed(place[last])
    return found

  monkeypatch.setattr(storage, "load", load_wrong)
  for wrong in whole:
    message = f"{wrong} has another check"
    with (
      pytest.raises(CheckpointError, match=message),
      Checkpoints(tmp_path) as checkpoints,
    ):
      checkpoints.restore(abstract(make_state(0)))
  for wrong in (path for path in whole if path.startswith("params/")):
    with pytest.raises(CheckpointError, match=f"{wrong} has another check"):
      restore_params(tmp_path, abstract(make_state(0)["params"]))


def test_a_second_damaged_step_keeps_both(tmp_path: Path) -> None:
  fill(tmp_path)
  for _ in range(2):
    _flip(tmp_path / "2" / "record" / "data.json")
    with Checkpoints(tmp_path) as checkpoints:
      assert checkpoints.restore(abstract(make_state(0))).step == 1
      checkpoints.save(2, make_state(2), {})
  assert names(tmp_path) == {"1", "2", "2.corrupt", "2.corrupt.2"}


def test_nothing_readable_is_an_error_and_renames_nothing(
  tmp_path: Path,
) -> None:
  fill(tmp_path)
  for step in ("1", "2"):
    (tmp_path / step / "state" / "_METADATA").unlink()
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(CheckpointError, match=r"step 2: .*; step 1: ") as error:
      checkpoints.restore(abstract(make_state(0)))
    assert not isinstance(error.value, NoCheckpointError)
  assert names(tmp_path) == {"1", "2"}
  for step in ("1", "2"):
    (tmp_path / step).rename(tmp_path / f"{step}.corrupt")
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(CheckpointError, match="only damaged"):
      checkpoints.latest()
    with pytest.raises(CheckpointError, match="only damaged"):
      checkpoints.restore(abstract(make_state(0)))


def test_readers_fall_back_without_renaming(tmp_path: Path, caplog) -> None:
  fill(tmp_path)
  shutil.rmtree(tmp_path / "2" / "state")
  step, params = restore_params(tmp_path, abstract(make_state(0)["params"]))
  assert step == 1 and bits(params) == bits(make_state(1)["params"])
  assert "2 is unreadable" in caplog.text
  assert read_meta(tmp_path)[0] == 2
  (tmp_path / "2" / "record" / "data.json").unlink()
  assert read_meta(tmp_path)[0] == 1
  with pytest.raises(CheckpointError, match="no readable checkpoint: step 2"):
    read_meta(tmp_path, 2)
  assert names(tmp_path) == {"1", "2"}


def test_failures_of_the_machine_are_not_damage(
  tmp_path: Path, monkeypatch
) -> None:
  fill(tmp_path)
  codes = (
    *("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAUTHENTICATED"),
    *("UNAVAILABLE", "DEADLINE_EXCEEDED"),
  )
  said = [ValueError(f"{code}: reading a chunk") for code in codes]
  for error in (MemoryError(), PermissionError(13, "no"), *said):

    def fail(*args, error=error):
      raise error

    monkeypatch.setattr(storage.v1, "load_checkpointables", fail)
    with (
      Checkpoints(tmp_path) as checkpoints,
      pytest.raises(CheckpointError, match="2: cannot be read"),
    ):
      checkpoints.restore(abstract(make_state(0)))
    assert names(tmp_path) == {"1", "2"}
