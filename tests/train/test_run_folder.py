"""The folder of a run: its lock, and the default name of a new one."""

import concurrent.futures
import contextlib
import dataclasses
import datetime
import multiprocessing
from pathlib import Path
import threading

import pytest
from train_cases import tiny

from rebased_jax import atomic
from train import cli, initial_state, start_run, stored_config
from train.config import ProfileConfig
from train.devices.mesh import MeshConfig
from train.records import run_folder
from train.records.run_folder import RunFolder, RunFolderError, default_folder

_CONFIG = tiny()


def _claim(path: Path, barrier: threading.Barrier) -> bool:
  """Return whether this thread or process got the lock of a folder."""
  folder = RunFolder(path)
  barrier.wait()
  try:
    folder.open(_CONFIG)
    with folder.locked():
      barrier.wait()  # all have tried
      return True
  except RunFolderError:
    barrier.wait()
    return False


def test_one_of_several_locks_a_new_folder(tmp_path: Path) -> None:
  """A lock belongs to an open file, and so excludes other threads, too."""
  barrier = threading.Barrier(3)
  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    for index in range(100):
      path = tmp_path / str(index)
      found = pool.map(_claim, 3 * [path], 3 * [barrier])
      assert list(found).count(True) == 1, index
  assert {x.name for x in path.iterdir()} == {"config.json"}


def _claim_all(root: Path, count: int, barrier) -> list[bool]:
  return [_claim(root / str(index), barrier) for index in range(count)]


@pytest.mark.slow
def test_one_of_two_processes_locks_each_of_1000_folders(
  tmp_path: Path,
) -> None:
  context = multiprocessing.get_context("spawn")
  with context.Manager() as manager:
    barrier = manager.Barrier(2)
    with concurrent.futures.ProcessPoolExecutor(2, context) as pool:
      rows = [pool.submit(_claim_all, tmp_path, 1000, barrier) for _ in "ab"]
      first, second = (x.result() for x in rows)
  assert [a + b for a, b in zip(first, second, strict=True)] == 1000 * [1]


def test_the_lock_is_exclusive_and_survives_an_update(tmp_path: Path) -> None:
  folder, other = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
  folder.open(_CONFIG)
  message = "another process is training in it"
  with folder.locked():
    with pytest.raises(RunFolderError, match=message), other.locked():
      pass
    folder.update(dataclasses.replace(_CONFIG, mesh=MeshConfig(fsdp=2)))
    assert other.read_config().mesh.fsdp == 2
    with pytest.raises(RunFolderError, match=message), other.locked():
      pass
    folder.update(_CONFIG)  # a second time
    with pytest.raises(RunFolderError, match=message), other.locked():
      pass
  with other.locked(), pytest.raises(RunFolderError), folder.locked():
    pass


def test_a_durable_file_is_on_the_disk_before_it_has_its_name(
  tmp_path: Path, monkeypatch
) -> None:
  path, synced = tmp_path / "x.json", []

  def sync(temp: Path) -> None:
    assert not path.exists()
    synced.append(Path(temp).read_text())

  monkeypatch.setattr(atomic, "sync", sync)
  atomic.write_bytes(path, b"5", durable=True)
  assert synced == ["5"] and path.read_text() == "5"
  atomic.write_bytes(path, b"6")
  assert synced == ["5"] and path.read_text() == "6"


def test_a_lock_on_a_replaced_file_does_not_count(
  tmp_path: Path, monkeypatch
) -> None:
  """The file is opened, then another process replaces it and ends."""
  folder = RunFolder(tmp_path / "run")
  folder.open(_CONFIG)
  lock, replaced = run_folder.fcntl.flock, []

  def flock(file, how) -> None:
    if not replaced:
      replaced.append(folder.config_file.read_text())
      atomic.write_text(folder.config_file, replaced[0])
    lock(file, how)

  monkeypatch.setattr(run_folder.fcntl, "flock", flock)
  with folder.locked():
    monkeypatch.undo()
    other = RunFolder(tmp_path / "run")
    with pytest.raises(RunFolderError, match="another"), other.locked():
      pass


_OTHER = {
  "model": dict(model=dict(width=32)),
  "optimizer": dict(optimizer=dict(learning_rate=1.0)),
  "steps": dict(steps=7),
  "loss_chunks": dict(loss_chunks=2),
  "eval_every": dict(eval_every=3),
  "save_every": dict(save_every=3),
  "log_every": dict(log_every=3),
  "keep": dict(keep=4),
  "keep_every": dict(keep_every=4),
  "keep_best": dict(keep_best="loss"),
  "stop_accuracy": dict(stop_accuracy=0.5),
  "init_from": dict(init_from="elsewhere"),
  "init_weights": dict(init_from="elsewhere", init_weights="ema"),
  "tensorboard": dict(tensorboard=True),
  "wandb": dict(wandb="project"),
  "profile": dict(profile=ProfileConfig(1, 2)),
  "nan": dict(nan="skip"),
  "z_loss": dict(z_loss=1e-4),
  "ema": dict(ema=0.9),
  "data": dict(data=dict(pairs=1)),
  "batch": dict(batch=16),
  "accumulate": dict(accumulate=2),
  "seed": dict(seed=1),
  "mesh": dict(mesh=MeshConfig(fsdp=2)),
}
_ABOUT_DATA = {"data", "batch", "accumulate", "seed"}
_ABOUT_OPTIMIZER = {"optimizer", "steps", "z_loss"}
_IDENTITY = {"model", "init_from", "init_weights", "ema"}


@pytest.mark.parametrize("name", _OTHER)
def test_what_may_change_in_a_run(tmp_path: Path, name: str) -> None:
  """How it works may, and with a flag data or optimiser."""
  assert _OTHER.keys() == {x.name for x in dataclasses.fields(_CONFIG)}
  folder, changed = RunFolder(tmp_path / "run"), tiny(**_OTHER[name])
  folder.open(_CONFIG)
  meta = dict(
    config=stored_config.to_dict(_CONFIG),
    data=changed.data.train_batches(changed.batch, changed.seed).fingerprint,
  )
  for allow in ("", "data", "optimizer"):
    kinds = {"data": _ABOUT_DATA, "optimizer": _ABOUT_OPTIMIZER}
    may = name in kinds.get(allow, ()) or name not in (
      _IDENTITY | _ABOUT_DATA | _ABOUT_OPTIMIZER
    )
    refused = pytest.raises(RunFolderError, match=rf"{name}\b.*: .* → ")
    flags = {f"allow_{x}_change": x == allow for x in kinds}
    with contextlib.nullcontext() if may else refused:
      folder.open(changed, **flags)
    with contextlib.nullcontext() if may else refused:
      found = initial_state.config_changes(
        meta,
        changed,
        folder,
        allow == "data",
        allow_optimizer=allow == "optimizer",
      )
      assert found and all(x.startswith(name) for x in found)


def test_a_killed_start_leaves_a_folder_that_can_be_used(tmp_path) -> None:
  (tmp_path / "config.json.tmp-host-1-1").write_text("{")
  RunFolder(tmp_path).open(_CONFIG)
  assert RunFolder(tmp_path).read_config() == _CONFIG
  with pytest.raises(FileExistsError):
    atomic.create_text(tmp_path / "config.json", "other")
  assert RunFolder(tmp_path).read_config() == _CONFIG


def test_runs_of_one_second_have_folders_of_their_own(
  tmp_path: Path, monkeypatch
) -> None:
  class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
      return cls(2026, 1, 2, 3, 4, 5)

  monkeypatch.setattr(run_folder.datetime, "datetime", Clock)
  monkeypatch.chdir(tmp_path)

  def make(_: int) -> str:
    with default_folder("mqar") as path:
      (path / "config.json").touch()
    return str(path)

  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    found = set(pool.map(make, range(12)))
  name = "runs/mqar-20260102-030405"
  assert found == {name, *(f"{name}-{x}" for x in range(2, 13))}
  with default_folder() as path:
    assert str(path) == "runs/20260102-030405"


def test_a_refused_run_leaves_no_default_folder(
  tmp_path: Path, monkeypatch
) -> None:
  monkeypatch.chdir(tmp_path)
  wrong = tiny(steps=4, batch=12)  # on eight devices
  with pytest.raises(ValueError, match="batch=12"):
    start_run.run(wrong)
  assert list(tmp_path.iterdir()) == []
  (tmp_path / "runs").mkdir()
  with pytest.raises(ValueError, match="batch=12"):
    start_run.run(wrong)
  assert list(tmp_path.rglob("*")) == [tmp_path / "runs"]
  with pytest.raises(KeyError), default_folder() as path:
    (path / "config.json").touch()
    raise KeyError
  assert path.exists()
  (tmp_path / "file").mkdir()
  monkeypatch.chdir(tmp_path / "file")
  Path("runs").touch()
  with pytest.raises(RunFolderError, match="cannot be made"):
    start_run.run(tiny())


def test_a_signal_at_the_start_leaves_no_default_folder(
  tmp_path: Path, monkeypatch
) -> None:
  """The process ends inside the context, by `os._exit`."""
  monkeypatch.chdir(tmp_path)
  with default_folder():
    cli._before_leaving(143)
    assert list(tmp_path.iterdir()) == []
  with default_folder() as path:
    (path / "config.json").touch()
    cli._before_leaving(143)
    assert path.exists()


def test_earlier_names_of_metrics_are_read(tmp_path: Path) -> None:
  folder = RunFolder(tmp_path)
  folder.metrics_file.write_text('{"kind": "train", "step": 1, "step_time": 2}')
  assert folder.read_metrics() == [
    {"kind": "train", "step": 1, "step_seconds": 2}
  ]
