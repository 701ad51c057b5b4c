"""Test where cached data is kept, also for users without a home."""

import os
from pathlib import Path
import pwd
import tempfile

import pytest
from train_cases import ROOT

from train import cli
from train.data.cache_folder import cache_folder, home_cache_folder


def _temporary(name: str) -> Path:
  return Path(tempfile.gettempdir(), f"rebased_jax-{os.getuid()}", name)


def test_it_is_in_the_home(tmp_path: Path, monkeypatch) -> None:
  monkeypatch.setenv("HOME", str(tmp_path / "not made yet"))
  wanted = tmp_path / "not made yet" / ".cache" / "rebased_jax" / "plans"
  assert cache_folder("plans") == wanted
  assert list(tmp_path.iterdir()) == []


def test_a_user_without_a_home_has_one(monkeypatch) -> None:
  """As a container's user whose number is in no list."""

  def unknown(number: int):
    raise KeyError(f"getpwuid(): uid not found: {number}")

  monkeypatch.delenv("HOME")
  monkeypatch.setattr(pwd, "getpwuid", unknown)
  with pytest.raises(RuntimeError):
    Path.home()
  assert cache_folder("plans") == _temporary("plans")
  # Programs are run: none in a folder that any user could have made.
  assert home_cache_folder("compiled") is None
  assert cli._compilation_cache() == {}


def test_programs_are_kept_in_the_home(tmp_path: Path, monkeypatch) -> None:
  monkeypatch.setenv("HOME", str(tmp_path))
  kept = cli._compilation_cache()["JAX_COMPILATION_CACHE_DIR"]
  assert kept == str(tmp_path / ".cache" / "rebased_jax" / "compiled")


def test_a_home_that_cannot_be_written_is_not_used(monkeypatch) -> None:
  """Such as `/`, which containers give to users that they do not know."""
  monkeypatch.setenv("HOME", "/")
  asked = []

  def access(path: Path, mode: int) -> bool:
    asked.append(path)
    return False

  monkeypatch.setattr(os, "access", access)
  assert cache_folder("mqar") == _temporary("mqar")
  assert asked[0] in (Path("/"), Path("/.cache"))


def test_no_other_module_asks_for_the_home() -> None:
  asking = [
    str(path.relative_to(ROOT))
    for package in ("train", "rebased_jax", "pallas_kernels")
    for path in (ROOT / package).rglob("*.py")
    if any(x in path.read_text() for x in ("Path.home", "expanduser"))
  ]
  assert asking == ["train/data/cache_folder.py"]
