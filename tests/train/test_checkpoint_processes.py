"""Checkpoints with other meshes, several processes, kills and full disks."""

from pathlib import Path
import random
import signal
import socket
import subprocess
import sys
import textwrap
import time

from checkpoint_cases import (
  ROOT,
  abstract,
  bits,
  make_state,
  names,
  sharded,
)
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.checkpoint.checkpoints import (
  Checkpoints,
  NoCheckpointError,
  read_meta,
  restore_params,
)

# Threads of a failed read may still complain after it has returned.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)


def test_a_checkpoint_is_read_on_other_meshes(tmp_path: Path) -> None:
  state = make_state(3)
  place = sharded(8, (4, 2))
  placed = jax.tree.map(lambda x: jax.device_put(x, place(x)), state)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(3, placed, {})
    for count, shape in ((8, (2, 4)), (4, (2, 2)), (2, (1, 2)), (1, (1, 1))):
      target = abstract(state, sharded(count, shape))
      restored = checkpoints.restore(target).state
      assert bits(restored) == bits(state)
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
    cwd=ROOT,
    env=_environment(devices),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_other_device_counts_in_new_processes(tmp_path: Path) -> None:
  for devices, mode, out in ((8, "save", ""), (4, "load", "4"), (1, "", "1")):
    process = _run(_PROCESS, str(tmp_path), mode, devices=devices)
    stdout, stderr = process.communicate(timeout=120)
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
    out, err = process.communicate(timeout=120)
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
    assert all(name.isdecimal() for name in names(tmp_path))


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
  out, err = process.communicate(timeout=120)
  lines = out.splitlines()
  assert len(lines) == 5, out + err
  for line in lines[:3]:
    assert line.startswith("checkpoint step 2 was not saved: ")
    assert "File too large" in line
  assert lines[3:] == ["1", "2"]
  assert process.returncode == 1
  last = err.splitlines()[-1]
  assert "CheckpointError: checkpoint step 4 was not saved" in last
