"""Run folders in Google Cloud Storage, with a local folder as the bucket."""

import importlib.util
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem
import pytest
from train_cases import call as call, tiny, trainer as trainer

import train
from train.records import plots
from train.records.metrics_writer import MetricsWriter
from train.records.run_folder import RunFolder, RunFolderError


class Bucket(LocalFileSystem):
  """A store that, as gcsfs, replaces a file that is opened to append."""

  cachable = False
  root = ""

  @classmethod
  def _strip_protocol(cls, path: str) -> str:
    name = str(path).removeprefix("gs://").removeprefix("gcs://")
    return name if name.startswith(cls.root) else f"{cls.root}/{name}"

  def _open(self, path: str, mode: str = "rb", **options):
    return super()._open(path, mode.replace("a", "w"), **options)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch) -> Path:
  """Make `gs://` a folder; its files are below `gs://mine/`."""
  monkeypatch.setattr(Bucket, "root", str(tmp_path / "bucket"))
  (tmp_path / "bucket").mkdir()
  find = importlib.util.find_spec
  there = lambda name, *args: name == "gcsfs" or find(name, *args)
  monkeypatch.setattr(importlib.util, "find_spec", there)
  make = lambda name, **_: Bucket()
  monkeypatch.setattr(fsspec, "filesystem", make)
  return tmp_path / "bucket"


def test_the_files_of_a_run_are_in_the_bucket(bucket: Path) -> None:
  folder, config = RunFolder("gs://mine/run"), tiny()
  folder.open(config)
  assert folder.read_config() == config and "run-" in folder.run_id()
  with folder.locked():
    folder.update(tiny(mesh=train.MeshConfig(data=1)))
  for step in (1, 2):  # a run, and the same one resumed
    with MetricsWriter(config, folder, active=True) as writer:
      writer.write("train", step, loss=1.0)
  assert [x["step"] for x in folder.read_metrics()] == [1, 2]
  folder.cut_metrics(1)
  folder.note_save(1)
  assert [x["step"] for x in folder.read_metrics()] == [1]
  plots.learning(
    folder.read_metrics(), config, folder.path / "learning.png", "title"
  )
  assert {x.name for x in (bucket / "mine" / "run").iterdir()} == {
    *("config.json", "metrics.jsonl", "last_save.json", "learning.png")
  }
  with pytest.raises(RunFolderError, match="although step 1 was saved"):
    RunFolder("gs://mine/run").open(tiny(mesh=train.MeshConfig(data=1)))


@pytest.mark.parametrize("verb", ["train", "resume", "evaluate", "generate"])
def test_a_missing_package_is_named(
  verb: str, call, monkeypatch, tmp_path: Path
) -> None:
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  more = {
    "train": ("mqar", "--run-dir", "gs://mine/run"),
    "generate": ("gs://mine/run", "--prompt", "a"),
  }.get(verb, ("gs://mine/run",))
  code, _, err = call(verb, *more)
  assert code == 2 and err.startswith("rebased: gs://mine/run: ")
  assert "pip install 'rebased-jax[gcs]'" in err and err.count("\n") == 1
  assert list(Path().iterdir()) == []


@pytest.mark.parametrize("path", ["s3://a/b", "gs:/a/b", "http://a", "file:/a"])
def test_other_stores_are_refused(path: str, tmp_path, monkeypatch) -> None:
  monkeypatch.chdir(tmp_path)
  for use in (RunFolder, train.load, lambda x: train.run(tiny(), x)):
    with pytest.raises(RunFolderError, match="expected a local folder or gs:"):
      use(path)
  assert list(tmp_path.iterdir()) == []
