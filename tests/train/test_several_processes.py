"""Runs with several processes, and runs resumed on another mesh."""

import dataclasses
import functools
from pathlib import Path
import shutil
import socket

import jax
import numpy as np
import pytest
from train_cases import (
  command,
  finish,
  flags,
  metrics,
  run,
  signal_at,
  tiny,
  trainer as trainer,
)

from train.checkpoint.checkpoints import read_meta
from train.devices import mesh as mesh_lib, processes as distributed
from train.devices.mesh import MeshConfig
from train.records.run_folder import RunFolder

# Many programs for eight devices, and up to four processes a test.
pytestmark = pytest.mark.slow

_CONFIG = tiny(
  model=dict(dropout=0.1, mlp_width=32), optimizer=dict(eps=1e-5), accumulate=2
)
# Sums in another order round differently; this is over six steps.
_near = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-5)


def _on(mesh: MeshConfig):
  return dataclasses.replace(_CONFIG, mesh=mesh)


@pytest.fixture
def devices(monkeypatch):
  """Use the given number of the eight devices in the runs that follow."""

  def take(count: int) -> None:
    make = functools.partial(make_mesh, devices=jax.devices()[:count])
    monkeypatch.setattr(mesh_lib, "make_mesh", make)

  make_mesh = mesh_lib.make_mesh
  return take


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, trainer: Path) -> Path:
  """Return a run of six steps on a 4 × 2 mesh, with checkpoints 2, 4, 6."""
  folder = tmp_path_factory.mktemp("run") / "undisturbed"
  _, out = run(_on(MeshConfig(data=2, fsdp=2, tensor=2)), folder)
  assert "mesh: data 2 × fsdp 2 × tensor 2" in out
  text = (folder / "sharding.txt").read_text()
  assert "pairs/second/mlp/up/kernel" in text and "–, fsdp, tensor" in text
  return folder


@pytest.mark.parametrize(
  ("count", "mesh"),
  [(4, MeshConfig(data=1, fsdp=2, context=2)), (1, MeshConfig())],
)
def test_resume_on_other_devices(
  undisturbed: Path, tmp_path: Path, devices, count: int, mesh: MeshConfig
) -> None:
  folder = tmp_path / "run"
  shutil.copytree(undisturbed, folder)
  shutil.rmtree(folder / "checkpoints" / "6")
  RunFolder(folder).note_save(4)  # as if step 6 never was
  devices(count)
  outcome, out = run(_on(mesh), folder)
  assert outcome.step == 6 and "resuming at step 4" in out
  assert "mesh.fsdp: 2 → " in out or "mesh.tensor: 2 → 1" in out
  assert "warning" not in out
  for kind in ("train", "eval"):
    _near(metrics(folder, kind), metrics(undisturbed, kind))
  assert RunFolder(folder).read_config() == _on(mesh)


def _together(
  processes: int, folder: Path, cache: Path, *options: str, last: str = ""
) -> list[tuple[int, str, str]]:
  """Run processes of two devices each; the last one runs code before."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  started = [
    command(
      *options,
      "--distributed",
      f"{address},{processes},{i}",
      cache=cache,
      before=last if i == processes - 1 else "",
      devices=2,
    )
    for i in range(processes)
  ]
  return [finish(process) for process in started]


def _train(folder: Path, mesh: MeshConfig) -> list[str]:
  config = flags(_on(mesh))
  return ["train", "mqar", *config, "--run-dir", str(folder)]


def test_two_processes_stop_together_and_resume(
  undisturbed: Path, tmp_path: Path, trainer: Path, devices
) -> None:
  """Each process holds half of the tokens of every row."""
  folder = tmp_path / "run"
  train = _train(folder, MeshConfig(data=1, context=4))
  ends = _together(2, folder, trainer, *train, last=signal_at(3, "SIGTERM"))
  assert [code for code, _, _ in ends] == [143, 143], ends
  assert "stopped at step" in ends[0][1] and "stopped at" not in ends[1][1]
  step, meta = read_meta(folder / "checkpoints")
  assert 3 <= step <= 4 and meta["finished"] is None
  assert f"stopped at step {step} and saved" in ends[0][1]
  devices(1)
  _, out = run(_on(MeshConfig()), folder)
  assert f"resuming at step {step}" in out
  for kind in ("train", "eval"):
    _near(metrics(folder, kind), metrics(undisturbed, kind))


# Raises where the other process does not, as a disk of one host does.
_NO_BATCH_5 = """
from train.data.in_vocabulary import InVocabulary
read = InVocabulary.read_rows
def read_rows(self, step, start, stop):
  if step == 5 and self.num_batches is None:
    raise OSError("the disk of this host is gone")
  return read(self, step, start, stop)
InVocabulary.read_rows = read_rows
"""


def test_two_processes_save_together_although_one_has_no_data(
  tmp_path: Path, trainer: Path, devices
) -> None:
  folder = tmp_path / "run"
  train = _train(folder, MeshConfig())
  first, second = _together(2, folder, trainer, *train, last=_NO_BATCH_5)
  assert second[0] == 1 and "the disk of this host is gone" in second[2]
  assert first[0] == 3, first
  assert "process 1 of 2 has failed, and its own output says why" in first[2]
  assert "saved at step 4 after a failure" in first[1]
  assert read_meta(folder / "checkpoints")[0] == 4
  devices(1)
  _, out = run(_on(MeshConfig()), folder)
  assert "resuming at step 4" in out
  run(_on(MeshConfig()), tmp_path / "undisturbed")
  for kind in ("train", "eval"):
    _near(metrics(folder, kind), metrics(tmp_path / "undisturbed", kind))


@pytest.mark.slow
@pytest.mark.parametrize(
  "mesh",
  [
    MeshConfig(),
    MeshConfig(fsdp=4),
    MeshConfig(tensor=4, data=2),
    MeshConfig(data=1, fsdp=2, context=4),
  ],
)
def test_four_processes_train_as_one(
  undisturbed: Path, tmp_path: Path, trainer: Path, mesh: MeshConfig
) -> None:
  folder = tmp_path / "run"
  config = dataclasses.replace(_on(mesh), accumulate=1, batch=8)
  train = ["train", "mqar", *flags(config), "--run-dir", str(folder)]
  ends = _together(4, folder, trainer, *train)
  assert [code for code, _, _ in ends] == [0] * 4, ends
  _, expected = run(config, tmp_path / "one")
  for kind in ("train", "eval"):
    _near(metrics(folder, kind), metrics(tmp_path / "one", kind))


@pytest.mark.slow
def test_a_refusal_reaches_every_process(
  undisturbed: Path, tmp_path: Path, trainer: Path
) -> None:
  config = dataclasses.replace(_on(MeshConfig(data=4)), seed=5)
  options = ["train", "mqar", *flags(config), "--run-dir", str(undisturbed)]
  ends = _together(2, undisturbed, trainer, *options)
  assert [code for code, _, _ in ends] == [2, 2], ends
  assert "seed: 0 → 5" in ends[0][2] and "process 0" in ends[1][2]


@pytest.mark.parametrize(
  ("how", "message"),
  [
    ("on", "distributed='on': expected off, auto, or HOST:PORT,N,I"),
    ("localhost:80,2,2", "with I < N"),
  ],
)
def test_processes_that_cannot_be_found(how: str, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    distributed.start(how)


def test_auto_finds_no_cluster_here(tmp_path: Path, trainer: Path) -> None:
  options = ("--distributed", "auto", "--run-dir", str(tmp_path / "run"))
  code, out, err = finish(command("train", "mqar", *options, cache=trainer))
  assert (code, out) == (2, "")
  assert "distributed='auto': jax found no other processes" in err
