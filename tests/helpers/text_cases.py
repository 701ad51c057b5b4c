"""Make a small text data set, and runs on it."""

import dataclasses
from pathlib import Path
import string
import textwrap

from data_cases import EOS, write_prepared
import jax
import numpy as np
import pytest
from train_cases import (
  run,
  tiny,
  trainer as trainer,
)

from train import compiled_steps, evaluate
from train.config import RunConfig, TextData
from train.devices import mesh as mesh_lib

# Real text: the paragraphs of two modules' source code.
TEXT = "".join(Path(x.__file__).read_text() for x in (textwrap, string))
DOCUMENTS = [
  np.append(np.frombuffer(x.encode(), np.uint8).astype(int), EOS)
  for x in TEXT.split("\n\n")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
  half = len(DOCUMENTS) // 2
  path = tmp_path_factory.mktemp("text") / "set"
  return write_prepared(
    path, (DOCUMENTS[:half], DOCUMENTS[half:]), domains=("code", "prose")
  )


def make_config(path: Path, *, data=None, model=None, **changes) -> RunConfig:
  base = tiny(model={**dict(vocab_size=257), **(model or {})})
  text = TextData(
    **{
      **dict(path=(str(path),), length=16, validation=0.2, eval_rows=20),
      **dict(cache_dir=str(path.parent / "plans")),
      **(data or {}),
    }
  )
  return dataclasses.replace(base, data=text, **changes)


def evaluated(config: RunConfig) -> dict[str, float]:
  """Return the held-out metrics of a fresh model."""
  mesh = mesh_lib.make_mesh()
  with jax.set_mesh(mesh):
    built = compiled_steps.build(config, mesh)
    params = compiled_steps.fresh_state(config, built).params
    data = config.data.eval_batches(config.batch, 0)
    return evaluate.evaluate(built, params, data)


def make_options(config: RunConfig) -> list[str]:
  """Return the options that turn the preset lm-tiny into a config."""
  data, model = config.data, config.model
  values = {
    "data.path": " ".join(data.path),
    "data.length": data.length,
    "data.validation": data.validation,
    "data.eval-rows": data.eval_rows,
    "data.cache-dir": data.cache_dir,
    "model.width": model.width,
    "model.pairs": 1,
    "model.mlp-width": None,
    "model.second.heads": 2,
    "optimizer.warmup-steps": 2,
  }
  for name in ("steps", "batch", "eval-every", "save-every", "log-every"):
    values[name] = getattr(config, name.replace("-", "_"))
  return [word for k, v in values.items() for word in (f"--{k}", str(v))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, trainer, folder: Path) -> Path:
  path = tmp_path_factory.mktemp("text-runs") / "run"
  run(make_config(folder), path)
  return path
