"""Checkpoints: bit-identical arrays, metadata, mismatches, wrong calls."""

import errno
import itertools
import json
import logging
import os
from pathlib import Path
import shutil
import threading
import time
from types import SimpleNamespace

from checkpoint_cases import (
  META,
  abstract,
  bits,
  fill,
  make_state,
  names,
)
from compilations import compilations
from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.checkpoint import orbax_storage, verify
from train.checkpoint.checkpoints import (
  FORMAT_VERSION,
  CheckpointError,
  Checkpoints,
  NoCheckpointError,
  read_meta,
  restore_params,
)

# Threads of a failed read may still complain after it has returned.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.mark.quick
def test_arrays_and_meta_come_back_bit_identical(tmp_path: Path) -> None:
  fill(tmp_path)
  with Checkpoints(tmp_path) as checkpoints:
    restored = checkpoints.restore(abstract(make_state(0)))
    assert checkpoints.latest() == 2 and checkpoints.steps() == [1, 2]
  assert (restored.step, restored.broken) == (2, ())
  assert restored.meta == {**META, "saved": 2}
  assert bits(restored.state) == bits(make_state(2))
  assert read_meta(tmp_path) == (2, {**META, "saved": 2})
  assert read_meta(tmp_path, 1) == (1, {**META, "saved": 1})


@pytest.mark.parametrize(("rows", "slices"), [(8, 0), (1 << 18, 1)])
def test_only_large_copies_are_saved_in_slices(
  tmp_path: Path, rows: int, slices: int
) -> None:
  mesh = jax.make_mesh((8,), ("d",))
  copies = jax.NamedSharding(mesh, jax.P())
  x = jax.device_put(np.arange(8 * rows, dtype=np.float32), copies)
  with compilations() as count, Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"x": x}, {})
  assert len([name for name in count if "slice" in name]) == slices, count
  with Checkpoints(tmp_path) as checkpoints:
    restored = checkpoints.restore(abstract({"x": x}))
  assert bits(restored.state) == bits({"x": x})


def test_leaves_that_cannot_be_saved_are_refused(tmp_path: Path) -> None:
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(TypeError, match="^rng: cannot save an array of key<"):
      checkpoints.save(1, {"rng": jax.random.key(0)}, {})
    with pytest.raises(
      TypeError, match="^a/b is a str: expected an array or a dict"
    ):
      checkpoints.save(1, {"a": {"b": "text"}}, {})
    with pytest.raises(ValueError, match="a/b"):
      checkpoints.save(1, {"a/b": jnp.ones(1)}, {})
    with pytest.raises(ValueError, match="one name on disk"):
      checkpoints.save(1, {"a.b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, {})
    with pytest.raises(TypeError, match="JSON"):
      checkpoints.save(1, {"a": jnp.ones(1)}, {"x": object()})
    assert checkpoints.latest() is None


def test_donated_buffers_are_saved_as_they_were(tmp_path: Path) -> None:
  bump = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = jnp.zeros((512, 512))
  with Checkpoints(tmp_path, keep=9) as checkpoints:
    for step in range(4):
      checkpoints.save(step, {"params": {"x": x}}, {})
      x = bump(x)
  for step in range(4):
    target = abstract({"x": x})
    _, params = restore_params(tmp_path, target, step)
    np.testing.assert_array_equal(params["x"], float(step))


def test_no_checkpoint_yet(tmp_path: Path) -> None:
  missing = tmp_path / "missing"
  for read in (read_meta, lambda d: restore_params(d, {})):
    with pytest.raises(NoCheckpointError, match="no checkpoint yet"):
      read(missing)
  assert not missing.exists()
  with Checkpoints(missing) as checkpoints:
    assert checkpoints.latest() is None and checkpoints.steps() == []
    with pytest.raises(NoCheckpointError):
      checkpoints.restore({})


def test_the_newest_steps_are_kept(tmp_path: Path) -> None:
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in (1, 5, 7, 30):
      checkpoints.save(step, make_state(step), {})
    assert checkpoints.steps() == [7, 30]
  with pytest.raises(ValueError, match="keep"):
    Checkpoints(tmp_path, keep=0)


def test_saving_a_step_again(tmp_path: Path) -> None:
  fill(tmp_path)
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(CheckpointError, match="step 2 over step 2"):
      checkpoints.save(2, make_state(2), {})
    checkpoints.restore(abstract(make_state(0)))
    checkpoints.save(2, make_state(2), {})
    checkpoints.save(3, make_state(3), {})
    checkpoints.save(3, make_state(3), {})
    with pytest.raises(CheckpointError, match="step 1 over step 3"):
      checkpoints.save(1, make_state(1), {})
    assert checkpoints.steps() == [1, 2, 3]


def test_parameters_are_read_alone(tmp_path: Path) -> None:
  fill(tmp_path)
  step, params = restore_params(tmp_path, abstract(make_state(0)["params"]))
  assert step == 2 and bits(params) == bits(make_state(2)["params"])
  bare = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_state(0)["params"]
  )
  step, params = restore_params(tmp_path, bare, 1)
  assert step == 1 and bits(params) == bits(make_state(1)["params"])
  with pytest.raises(CheckpointError, match=r"no step 9, only \[1, 2\]"):
    restore_params(tmp_path, bare, 9)


def test_a_mismatch_names_the_parameter_and_is_not_damage(
  tmp_path: Path,
) -> None:
  fill(tmp_path)
  shaped = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  wrong = {
    "params/embed/kernel: stored float32[64,8], expected float32[8,8]": (
      lambda t: t["embed"].update(kernel=shaped(8, 8))
    ),
    "params/mixer/half: stored bfloat16[40], expected float32[40]": (
      lambda t: t["mixer"].update(half=shaped(40))
    ),
    "params/new: stored nothing, expected float32[]": (
      lambda t: t.update(new=shaped())
    ),
    "params/embed/kernel: stored float32[64,8], expected nothing": (
      lambda t: t["embed"].clear()
    ),
  }
  for message, change in wrong.items():
    target = abstract(make_state(0))
    change(target["params"])
    with pytest.raises(CheckpointError) as error:
      restore_params(tmp_path, target["params"])
    assert message in str(error.value)
    with Checkpoints(tmp_path) as checkpoints:
      with pytest.raises(CheckpointError) as error:
        checkpoints.restore(target)
      assert message in str(error.value) and "\n" not in str(error.value)
  assert names(tmp_path) == {"1", "2"}


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch) -> None:
  monkeypatch.setattr(verify, "FORMAT_VERSION", FORMAT_VERSION + 1)
  fill(tmp_path)
  monkeypatch.undo()
  with pytest.raises(CheckpointError, match="has format 4"):
    read_meta(tmp_path)


def test_an_older_format_is_refused_with_advice(
  tmp_path: Path, monkeypatch
) -> None:
  with monkeypatch.context() as patch:
    patch.setattr(verify, "FORMAT_VERSION", 1)
    fill(tmp_path, steps=(1,))
  with pytest.raises(CheckpointError, match="has format 1, .* run again"):
    read_meta(tmp_path)


def _readers(directory: Path, run: str | None):
  target = abstract(make_state(0))

  def restore():
    with Checkpoints(directory, run=run) as checkpoints:
      return checkpoints.restore(target)

  params = target["params"]
  return (
    restore,
    lambda: read_meta(directory, run=run),
    lambda: restore_params(directory, params, run=run),
  )


def test_process_0_alone_renames_a_step(tmp_path: Path, monkeypatch) -> None:
  monkeypatch.setattr(orbax_storage, "all_processes", lambda passed: passed)
  (tmp_path / "1").mkdir()
  for process, expected in ((1, "1"), (0, "1.corrupt")):
    monkeypatch.setattr(jax, "process_index", lambda p=process: p)
    root = epath.Path(tmp_path)
    orbax_storage.rename(root / "1", root / "1.corrupt")
    assert [path.name for path in tmp_path.iterdir()] == [expected]


@pytest.mark.parametrize("how", ["renamed", "copied"])
def test_a_step_under_another_name_is_refused(tmp_path: Path, how: str) -> None:
  fill(tmp_path)
  if how == "renamed":
    (tmp_path / "2").rename(tmp_path / "3")
  else:
    shutil.copytree(tmp_path / "1", tmp_path / "3")
  before = names(tmp_path)
  stored = 2 if how == "renamed" else 1
  message = rf"3: the checkpoint is of step {stored}: expected step 3, .*rename"
  for read in _readers(tmp_path, None):
    with pytest.raises(CheckpointError, match=message):
      read()
  with pytest.raises(CheckpointError, match=message):
    read_meta(tmp_path, 3)
  assert names(tmp_path) == before
  assert read_meta(tmp_path, 1)[0] == 1


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
  with Checkpoints(tmp_path, run="mine-1") as checkpoints:
    checkpoints.save(1, make_state(1), {})
  with Checkpoints(tmp_path / "none") as checkpoints:
    checkpoints.save(1, make_state(1), {})
  wrong = [
    (tmp_path, "other-2", "of the run 'mine-1': expected 'other-2'"),
    (tmp_path / "none", "other-2", "of no run: expected 'other-2'"),
  ]
  for directory, run, message in wrong:
    for read in _readers(directory, run):
      with pytest.raises(CheckpointError, match=message):
        read()
  for run in ("mine-1", None):
    for read in _readers(tmp_path, run):
      read()


def test_a_checkpoint_of_format_2_is_read(tmp_path: Path, monkeypatch) -> None:
  make = verify.make_record

  def without_step_and_run(state, meta, **_):
    body = make(state, meta, step=1, run=None)
    for name in ("step", "run", "sha256"):
      del body[name]
    return {
      **body,
      "format_version": 2,
      "sha256": verify._seal({**body, "format_version": 2}),
    }

  with monkeypatch.context() as patch:
    patch.setattr(verify, "make_record", without_step_and_run)
    fill(tmp_path, steps=(1,))
  for read in _readers(tmp_path, None):
    read()
  for read in _readers(tmp_path, "mine-1"):
    with pytest.raises(CheckpointError, match="of no run"):
      read()


def test_a_save_is_told_when_it_is_on_the_disk(tmp_path: Path) -> None:
  saved = []

  def note(step: int) -> None:
    assert (tmp_path / str(step) / "record" / "data.json").exists()
    saved.append(step)

  with Checkpoints(tmp_path, on_saved=note) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, make_state(step), {})
    end = time.monotonic() + 30
    while saved != [1, 2]:  # nobody waits for the save
      assert time.monotonic() < end, saved
      time.sleep(0.01)


def test_a_failure_that_the_storage_only_logs_ends_the_wait(
  tmp_path: Path, monkeypatch
) -> None:
  """With several processes it waits for the others, which wait for it."""
  over = threading.Event()

  def log_and_wait(*_: object, **__: object) -> SimpleNamespace:
    error = OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    place = ("absl", logging.ERROR, "/orbax/checkpoint/save.py", 1)
    record = logging.LogRecord(*place, "failed", (), (OSError, error, None))
    timer = threading.Timer(0.1, logging.getLogger("absl").handle, (record,))
    timer.start()
    return SimpleNamespace(result=lambda: over.wait(30))

  with Checkpoints(tmp_path) as checkpoints:
    monkeypatch.setattr(
      checkpoints._writer._checkpointer,
      "save_checkpointables_async",
      log_and_wait,
    )
    checkpoints.save(1, make_state(1), {})
    with pytest.raises(CheckpointError, match="step 1 was not .*too large"):
      checkpoints.wait()
  over.set()


def test_a_save_that_cannot_be_told_is_an_error(tmp_path: Path) -> None:
  def note(step: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  message = "step 1 was saved, but not noted: OSError: .*No space left"
  with (
    pytest.raises(CheckpointError, match=message),
    Checkpoints(tmp_path, on_saved=note) as checkpoints,
  ):
    checkpoints.save(1, make_state(1), {})


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
  (tmp_path / "file").write_text("")
  with pytest.raises(CheckpointError, match="cannot hold checkpoints"):
    Checkpoints(tmp_path / "file" / "run")
  with pytest.raises(CheckpointError, match="NotADirectoryError"):
    read_meta(tmp_path / "file")


def test_an_error_in_the_loop_is_not_replaced(tmp_path, monkeypatch, caplog):
  with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, make_state(1), {})
    failure = CheckpointError("checkpoint step 1 was not saved: full")

    def fail():
      raise failure

    monkeypatch.setattr(checkpoints._writer, "wait", fail)
    raise ZeroDivisionError
  assert "was not saved: full" in caplog.text


def test_reading_and_saving_print_nothing(
  tmp_path: Path, capfd, caplog
) -> None:
  caplog.set_level(logging.INFO)
  fill(tmp_path)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.restore(abstract(make_state(0)))
  assert capfd.readouterr() == ("", "") and caplog.records == []


def test_checksums_change_with_places_values_and_bits() -> None:
  one = lambda x: verify.checksums({"x": jnp.asarray(x)})["x"]
  base = np.arange(1000, dtype=np.float32)
  seen = {one(base), one(base[::-1].copy()), one(np.zeros_like(base))}
  for place in range(0, 1000, 100):
    for bit in range(0, 32, 5):
      bits = base.view(np.uint32).copy()
      bits[place] ^= np.uint32(1 << bit)
      seen.add(one(bits.view(np.float32)))
  assert len(seen) == 3 + 10 * 7
  assert one(np.float32(0)) != one(np.float32(-0.0))
  with jax.enable_x64(True):
    assert one(np.float64(1)) != one(np.float64(1 + 2**-50))


def _checksum_by_hand(array: np.ndarray) -> int:
  """Return the checksum as its definition says, in NumPy."""

  def mix(word):
    word = ((word ^ (word >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    word = ((word ^ (word >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return word ^ (word >> 16)

  words = np.ascontiguousarray(array).view(f"u{min(array.itemsize, 4)}")
  total = 0
  for place, word in enumerate(words.ravel().astype(np.uint64).tolist()):
    total += mix((word + mix(place + 1)) & 0xFFFFFFFF)
  return total % 2**32


def test_one_checksum_is_computed_at_a_time(monkeypatch) -> None:
  """Many queued programs can make the devices of a CPU wait for good."""
  seen = []

  class Sum:
    def __int__(self) -> int:
      seen.append("read")
      return 0

  def start(_: jax.Array) -> Sum:
    seen.append("start")
    return Sum()

  monkeypatch.setattr(verify, "_checksum", start)
  verify.checksums({name: jnp.ones(1) for name in "abc"})
  assert seen == ["start", "read"] * 3


def test_checksums_are_those_that_older_checkpoints_hold() -> None:
  rng = np.random.default_rng(0)
  arrays = {
    "vector": rng.normal(size=37).astype(np.float32),
    "matrix": rng.normal(size=(5, 7)).astype(np.float32),
    "tensor": rng.normal(size=(3, 4, 5)).astype(np.float32),
    "half": np.asarray(jnp.asarray(rng.normal(size=(6, 4)), jnp.bfloat16)),
    "bytes": rng.integers(0, 256, (3, 5), np.uint8),
    "mask": rng.normal(size=(4, 4)) > 0,
    "scalar": np.float32(0.1),
    "empty": np.zeros((0, 3), np.float32),
  }
  found = verify.checksums({k: jnp.asarray(v) for k, v in arrays.items()})
  by_hand = {k: _checksum_by_hand(np.asarray(v)) for k, v in arrays.items()}
  assert found == by_hand
  assert found["scalar"] == 3518639523


def test_checksums_see_the_order_of_the_axes() -> None:
  """A transpose, a turn or a swap of rows or columns moves elements only."""
  one = lambda x: verify.checksums({"x": jnp.asarray(x)})["x"]
  square = np.arange(36, dtype=np.float32).reshape(6, 6)
  cube = np.arange(64, dtype=np.float32).reshape(4, 4, 4)
  moved = [
    square,
    square.T,
    np.rot90(square),
    square[::-1],
    square[:, ::-1],
    square[:, [1, 0, 2, 3, 4, 5]],
    square[[1, 0, 2, 3, 4, 5]],
  ]
  assert len({one(x) for x in moved}) == len(moved)
  turned = [cube.transpose(axes) for axes in itertools.permutations(range(3))]
  assert len({one(x) for x in turned}) == 6


def test_record_round_trips_through_json() -> None:
  meta = {1: 0.1, "t": (1, 2)}
  record = verify.make_record({"a": jnp.ones(2)}, meta, step=3, run="mine")
  verify.check_record(json.loads(json.dumps(record)))
  assert record["meta"] == {"1": 0.1, "t": [1, 2]}
  record["meta"]["1"] = 0.2
  with pytest.raises(verify.DamagedError):
    verify.check_record(record)


def test_a_directory_relative_to_the_working_one(tmp_path, monkeypatch) -> None:
  monkeypatch.chdir(tmp_path)
  state = make_state(1)
  with Checkpoints("runs/mine/checkpoints") as checkpoints:
    checkpoints.save(1, state, META)
  with Checkpoints(Path("runs") / "mine" / "checkpoints") as checkpoints:
    restored = checkpoints.restore(abstract(state))
  assert bits(restored.state) == bits(state)
  assert read_meta("runs/mine/checkpoints") == (1, META)
  target = abstract(state["params"])
  _, params = restore_params("runs/mine/checkpoints", target)
  assert bits(params) == bits(state["params"])
