"""Checkpoints: bits, meshes, damage, kills, failing disks."""

import json
import logging
from pathlib import Path
import random
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np
import pytest

from train import checkpoint_record
from train.checkpoint import (
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

_ROOT = Path(__file__).parents[1]
_META = {"config": {"lr": 1e-3, "layers": [1, 2]}, "data": "f00d", "x": None}


def _state(seed: int) -> dict:
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  odd = np.array([0x7F800001, 0xFF800000, 1, 0x80000000], np.uint32)
  return {
    "step": jnp.int32(seed),
    "params": {
      "embed": {"kernel": jnp.asarray(normal(64, 8))},
      "mixer": {
        "half": jnp.asarray(normal(40)).astype(jnp.bfloat16),
        "zeros": jnp.zeros((8, 3)),
        "nans": jax.lax.bitcast_convert_type(jnp.asarray(odd), jnp.float32),
      },
    },
    "opt_state": {
      "mu": {"embed": {"kernel": jnp.asarray(normal(64, 8))}},
      "count": jnp.int32(-seed),
      "scale": jnp.float32(0.1),
      "mask": jnp.asarray(normal(9) > 0),
      "empty": {},
    },
    "rng": jax.random.key_data(jax.random.key(seed)),
  }


def _abstract(state, sharding=None):
  spec = lambda x: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=sharding(x) if sharding else x.sharding
  )
  return jax.tree.map(spec, state)


def _bits(tree) -> dict:
  flat, structure = jax.tree.flatten_with_path(tree)
  leaves = {
    jax.tree_util.keystr(path): (
      leaf.dtype,
      leaf.shape,
      np.asarray(leaf).tobytes(),
    )
    for path, leaf in flat
  }
  return {"structure": structure, **leaves}


def _fill(directory: Path, steps=(1, 2)) -> None:
  with Checkpoints(directory) as checkpoints:
    for step in steps:
      checkpoints.save(step, _state(step), {**_META, "saved": step})


def _names(directory: Path) -> set[str]:
  return {path.name for path in directory.iterdir()}


def test_bits_and_meta(tmp_path: Path) -> None:
  _fill(tmp_path)
  with Checkpoints(tmp_path) as checkpoints:
    restored = checkpoints.restore(_abstract(_state(0)))
    assert checkpoints.latest() == 2 and checkpoints.steps() == [1, 2]
  assert (restored.step, restored.broken) == (2, ())
  assert restored.meta == {**_META, "saved": 2}
  assert _bits(restored.state) == _bits(_state(2))
  assert read_meta(tmp_path) == (2, {**_META, "saved": 2})
  assert read_meta(tmp_path, 1) == (1, {**_META, "saved": 1})


def test_typed_key_and_other_leaves_are_refused(tmp_path: Path) -> None:
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(TypeError, match="^rng: cannot save an array of key<"):
      checkpoints.save(1, {"rng": jax.random.key(0)}, {})
    with pytest.raises(TypeError, match="^a/b: not an array or a dict but str"):
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
    target = _abstract({"x": x})
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


def test_keeps_the_newest(tmp_path: Path) -> None:
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in (1, 5, 7, 30):
      checkpoints.save(step, _state(step), {})
    assert checkpoints.steps() == [7, 30]
  with pytest.raises(ValueError, match="keep"):
    Checkpoints(tmp_path, keep=0)


def test_saving_a_step_again(tmp_path: Path) -> None:
  _fill(tmp_path)
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(CheckpointError, match="step 2 over step 2"):
      checkpoints.save(2, _state(2), {})
    checkpoints.restore(_abstract(_state(0)))
    checkpoints.save(2, _state(2), {})
    checkpoints.save(3, _state(3), {})
    checkpoints.save(3, _state(3), {})
    with pytest.raises(CheckpointError, match="step 1 over step 3"):
      checkpoints.save(1, _state(1), {})
    assert checkpoints.steps() == [1, 2, 3]


def test_params_alone(tmp_path: Path) -> None:
  _fill(tmp_path)
  step, params = restore_params(tmp_path, _abstract(_state(0)["params"]))
  assert step == 2 and _bits(params) == _bits(_state(2)["params"])
  bare = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), _state(0)["params"]
  )
  step, params = restore_params(tmp_path, bare, 1)
  assert step == 1 and _bits(params) == _bits(_state(1)["params"])
  with pytest.raises(CheckpointError, match=r"no step 9, only \[1, 2\]"):
    restore_params(tmp_path, bare, 9)


def test_a_mismatch_names_the_parameter_and_is_not_damage(
  tmp_path: Path,
) -> None:
  _fill(tmp_path)
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
    target = _abstract(_state(0))
    change(target["params"])
    with pytest.raises(CheckpointError) as error:
      restore_params(tmp_path, target["params"])
    assert message in str(error.value)
    with Checkpoints(tmp_path) as checkpoints:
      with pytest.raises(CheckpointError) as error:
        checkpoints.restore(target)
      assert message in str(error.value) and "\n" not in str(error.value)
  assert _names(tmp_path) == {"1", "2"}


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch) -> None:
  monkeypatch.setattr(checkpoint_record, "FORMAT_VERSION", FORMAT_VERSION + 1)
  _fill(tmp_path)
  monkeypatch.undo()
  with pytest.raises(CheckpointError, match="has format 2"):
    read_meta(tmp_path)


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
  _fill(tmp_path / "whole")
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
      restored = checkpoints.restore(_abstract(_state(0)))
      assert _bits(restored.state) == _bits(_state(restored.step)), file
      assert restored.meta == {**_META, "saved": restored.step}
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
  assert _names(run) == {"1", "2.corrupt"} and broken.kept_as == "2.corrupt"
  assert checkpoints.latest() == 1
  checkpoints.save(2, _state(22), {})
  assert checkpoints.steps() == [1, 2]
  again = checkpoints.restore(_abstract(_state(0)))
  assert again.step == 2 and _bits(again.state) == _bits(_state(22))


def test_a_flipped_bit_in_any_part_of_the_data_is_found(tmp_path: Path) -> None:
  _fill(tmp_path, (1,))
  data = max(tmp_path.rglob("d/*"), key=lambda path: path.stat().st_size)
  whole = data.read_bytes()
  target = _abstract(_state(0)["params"])
  outcomes = {"right": 0, "found": 0}
  for place in range(0, len(whole), len(whole) // 40):
    data.write_bytes(
      whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :]
    )
    try:
      _, params = restore_params(tmp_path, target)
      assert _bits(params) == _bits(_state(1)["params"])
      outcomes["right"] += 1
    except CheckpointError as error:
      assert "no readable checkpoint" in str(error)
      outcomes["found"] += 1
  assert outcomes["found"] > 4, outcomes


def test_a_second_damaged_step_keeps_both(tmp_path: Path) -> None:
  _fill(tmp_path)
  for _ in range(2):
    _flip(tmp_path / "2" / "record" / "data.json")
    with Checkpoints(tmp_path) as checkpoints:
      assert checkpoints.restore(_abstract(_state(0))).step == 1
      checkpoints.save(2, _state(2), {})
  assert _names(tmp_path) == {"1", "2", "2.corrupt", "2.corrupt.2"}


def test_nothing_readable_is_an_error_and_renames_nothing(
  tmp_path: Path,
) -> None:
  _fill(tmp_path)
  for step in ("1", "2"):
    (tmp_path / step / "state" / "_METADATA").unlink()
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(CheckpointError, match=r"step 2: .*; step 1: ") as error:
      checkpoints.restore(_abstract(_state(0)))
    assert not isinstance(error.value, NoCheckpointError)
  assert _names(tmp_path) == {"1", "2"}
  for step in ("1", "2"):
    (tmp_path / step).rename(tmp_path / f"{step}.corrupt")
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(CheckpointError, match="only damaged"):
      checkpoints.latest()
    with pytest.raises(CheckpointError, match="only damaged"):
      checkpoints.restore(_abstract(_state(0)))


def test_readers_fall_back_without_renaming(tmp_path: Path, caplog) -> None:
  _fill(tmp_path)
  shutil.rmtree(tmp_path / "2" / "state")
  step, params = restore_params(tmp_path, _abstract(_state(0)["params"]))
  assert step == 1 and _bits(params) == _bits(_state(1)["params"])
  assert "2 is unreadable" in caplog.text
  assert read_meta(tmp_path)[0] == 2
  (tmp_path / "2" / "record" / "data.json").unlink()
  assert read_meta(tmp_path)[0] == 1
  with pytest.raises(CheckpointError, match="no readable checkpoint: step 2"):
    read_meta(tmp_path, 2)
  assert _names(tmp_path) == {"1", "2"}


@pytest.mark.parametrize("error", [MemoryError(), PermissionError(13, "no")])
def test_trouble_of_the_machine_is_not_damage(
  tmp_path: Path, monkeypatch, error
) -> None:
  _fill(tmp_path)
  with Checkpoints(tmp_path) as checkpoints:
    from train import checkpoint_storage

    def fail(*args):
      raise error

    monkeypatch.setattr(
      checkpoint_storage.v1, "load_checkpointables", fail, raising=True
    )
    with pytest.raises(CheckpointError, match="2: cannot be read"):
      checkpoints.restore(_abstract(_state(0)))
  assert _names(tmp_path) == {"1", "2"}


def _sharded(count: int, shape: tuple[int, int]):
  mesh = Mesh(np.array(jax.devices()[:count]).reshape(shape), ("a", "b"))

  def place(leaf):
    if leaf.ndim == 2:
      return NamedSharding(mesh, P("a", "b" if leaf.shape[1] == 8 else None))
    return NamedSharding(mesh, P())

  return place


def test_other_meshes(tmp_path: Path) -> None:
  state = _state(3)
  place = _sharded(8, (4, 2))
  placed = jax.tree.map(lambda x: jax.device_put(x, place(x)), state)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(3, placed, {})
    for count, shape in ((8, (2, 4)), (4, (2, 2)), (2, (1, 2)), (1, (1, 1))):
      target = _abstract(state, _sharded(count, shape))
      restored = checkpoints.restore(target).state
      assert _bits(restored) == _bits(state)
      for leaf, spec in zip(
        jax.tree.leaves(restored), jax.tree.leaves(target), strict=True
      ):
        assert leaf.sharding == spec.sharding


_PROCESS = """
import sys
import jax, jax.numpy as jnp, numpy as np
from train.checkpoint import *
directory, save = sys.argv[1], sys.argv[2] == "save"
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
w = np.arange(64, dtype=np.float32).reshape(16, 4) ** 0.5
with Checkpoints(directory) as c:
  if save:
    c.save(1, {"params": {"w": jax.device_put(w, split)}}, {})
  else:
    spec = jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=split)
    got = c.restore({"params": {"w": spec}}).state["params"]["w"]
    assert bytes(np.asarray(got)) == bytes(w) and got.sharding == split
    print(len(got.addressable_shards))
"""


def _environment(devices: int) -> dict[str, str]:
  return {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    "PATH": "/usr/bin:/bin",
  }


def _run(code: str, *args: str, devices: int = 1) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(code), *args],
    cwd=_ROOT,
    env=_environment(devices),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_other_device_counts_in_new_processes(tmp_path: Path) -> None:
  for devices, mode, out in ((8, "save", ""), (4, "load", "4"), (1, "", "1")):
    process = _run(_PROCESS, str(tmp_path), mode, devices=devices)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout.strip(), stderr) == (0, out, "")


_TWO = """
import os, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import multihost_utils
from train.checkpoint import *
directory, index, address = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(address, 2, index)
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
x = np.arange(64, dtype=np.float32).reshape(16, 4) ** 0.5
w = jax.make_array_from_callback(x.shape, split, lambda part: x[part])
spec = jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=split)
with Checkpoints(directory) as c:
  c.save(1, {"w": w}, {})
  c.save(2, {"w": w}, {})
  assert c.restore({"w": spec}).step == 2
  multihost_utils.sync_global_devices("saved")
  if index == 0:
    os.remove(directory + "/2/record/data.json")
  multihost_utils.sync_global_devices("damaged")
  got = c.restore({"w": spec})
  for shard in got.state["w"].addressable_shards:
    assert bytes(np.asarray(shard.data)) == bytes(x[shard.index])
  c.save(2, {"w": w}, {})
  print("result", got.step, got.broken[0].kept_as, c.steps())
"""


@pytest.mark.slow
def test_two_processes_fall_back_together(tmp_path: Path) -> None:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  pair = [_run(_TWO, str(tmp_path), str(i), address) for i in range(2)]
  for process in pair:
    out, err = process.communicate(timeout=120)
    assert "result 1 2.corrupt [1, 2]\n" in out, out + err


_KILLED = """
import sys
import jax.numpy as jnp
from train.checkpoint import *
with Checkpoints(sys.argv[1], keep=2) as c:
  step = c.latest() or 0
  print("start", step, flush=True)
  while True:
    step += 1
    w = jnp.full((300, 300), step / 7)
    c.save(step, {"params": {"w": w}}, {"at": step})
    print(step, flush=True)
"""


def test_kill_during_saves(tmp_path: Path) -> None:
  rng = random.Random(0)
  target = {"w": jax.ShapeDtypeStruct((300, 300), jnp.float32)}
  for _ in range(5):
    process = _run(_KILLED, str(tmp_path))
    assert process.stdout.readline().startswith("start")
    begun = int(process.stdout.readline())
    time.sleep(rng.uniform(0, 0.25))
    process.send_signal(signal.SIGKILL)
    out, err = process.communicate(timeout=30)
    assert err == ""
    begun = int((out.split() or [begun])[-1])
    try:
      step, params = restore_params(tmp_path, target)
    except NoCheckpointError:
      assert begun == 1
      continue
    assert step >= begun - 1
    np.testing.assert_array_equal(params["w"], jnp.float32(step / 7))
    assert read_meta(tmp_path) == (step, {"at": step})
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(10**6, {"params": {"w": jnp.ones(1)}}, {})
    checkpoints.wait()
    assert all(name.isdecimal() for name in _names(tmp_path))


_FULL_DISK = """
import resource, signal, sys
import jax.numpy as jnp
from train.checkpoint import *
big = {"params": {"w": jnp.arange(200_000) * 0.37}}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
with Checkpoints(sys.argv[1]) as c:
  c.save(1, {"params": {"w": jnp.ones(3)}}, {})
  c.wait()
  for again in (c.wait, lambda: c.save(3, big, {}), c.steps):
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
      c.save(2, big, {})
      again()
    except CheckpointError as error:
      print(error)
  resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
  print(c.latest())
  c.save(2, big, {})
  print(c.latest())
  resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
  c.save(4, big, {})
"""


def test_a_failing_save_is_reported(tmp_path: Path) -> None:
  process = _run(_FULL_DISK, str(tmp_path))
  out, err = process.communicate(timeout=60)
  lines = out.splitlines()
  assert len(lines) == 5, out + err
  for line in lines[:3]:
    assert line.startswith("checkpoint step 2 was not saved: ")
    assert "File too large" in line
  assert lines[3:] == ["1", "2"]
  assert process.returncode == 1
  last = err.splitlines()[-1]
  assert "CheckpointError: checkpoint step 4 was not saved" in last


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
  (tmp_path / "file").write_text("")
  with pytest.raises(CheckpointError, match="cannot hold checkpoints"):
    Checkpoints(tmp_path / "file" / "run")
  with pytest.raises(CheckpointError, match="NotADirectoryError"):
    read_meta(tmp_path / "file")


def test_an_error_in_the_loop_is_not_replaced(tmp_path, monkeypatch, caplog):
  with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, _state(1), {})
    failure = CheckpointError("checkpoint step 1 was not saved: full")

    def fail():
      raise failure

    monkeypatch.setattr(checkpoints._writer, "wait", fail)
    raise ZeroDivisionError
  assert "was not saved: full" in caplog.text


def test_quiet(tmp_path: Path, capfd, caplog) -> None:
  caplog.set_level(logging.INFO)
  _fill(tmp_path)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.restore(_abstract(_state(0)))
  assert capfd.readouterr() == ("", "") and caplog.records == []


def test_checksum_sees_places_values_and_bits() -> None:
  one = lambda x: checkpoint_record.checksums({"x": jnp.asarray(x)})["x"]
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


def test_record_round_trips_through_json() -> None:
  record = checkpoint_record.make({"a": jnp.ones(2)}, {1: 0.1, "t": (1, 2)})
  checkpoint_record.check(json.loads(json.dumps(record)))
  assert record["meta"] == {"1": 0.1, "t": [1, 2]}
  record["meta"]["1"] = 0.2
  with pytest.raises(checkpoint_record.DamagedError):
    checkpoint_record.check(record)
