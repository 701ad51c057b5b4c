"""Settings of the tests themselves: XLA flags, and the cache of programs."""

import os
from pathlib import Path

import jax
import jax_settings


def test_there_are_eight_devices() -> None:
  assert len(jax.devices("cpu")) == jax_settings.DEVICES == 8


def test_a_cache_that_has_outgrown_its_limit_starts_anew(
  tmp_path: Path,
) -> None:
  folder = tmp_path / "programs"
  jax_settings.limit_cache(folder)  # there is none yet
  folder.mkdir()
  (folder / "a").write_bytes(b"12345")
  jax_settings.limit_cache(folder, limit=5)
  assert (folder / "a").exists()
  jax_settings.limit_cache(folder, limit=4)
  assert not folder.exists()


def test_variables_that_are_set_win(monkeypatch) -> None:
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
  monkeypatch.setenv("XLA_FLAGS", "--mine")
  variables = jax_settings.jax_variables()
  assert variables["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"
  assert jax_settings.xla_flags().split()[0] == "--mine"
  assert os.environ["XLA_FLAGS"] == "--mine"
