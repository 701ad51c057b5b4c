"""Held-out metrics on meshes of eight devices are those of one device."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from train_cases import tiny, trainer as trainer

from rebased_jax import BaseConvConfig, ModelConfig, ReBasedConfig
from train import compiled_steps, evaluate, metrics
from train.config import OptimizerConfig, RunConfig, TextData
from train.data.batches import Batches
from train.devices import mesh as mesh_lib
from train.devices.mesh import MeshConfig
from train.metrics import TargetMetric

_B, _T, _V = 8, 16, 4  # so few tokens that many bigrams occur twice in a row

# A metric whose targets and values are no other metric's.
_SURPRISE = TargetMetric(
  "surprise", lambda t: t.nll_BM**2, among=lambda t: 1 - t.correct_BM
)


@dataclasses.dataclass(frozen=True)
class _Rows(Batches):
  """Two batches of packed documents, with padding in half of the rows."""

  rows: int = _B
  length: int = _T
  num_batches: int = 2
  fingerprint = dict(data="rows")

  def read_rows(self, step: int, start: int, stop: int) -> dict:
    rng = np.random.default_rng(step)
    tokens_BW = rng.integers(0, _V, (_B, _T + 1), dtype=np.int32)
    starts_BT = rng.random((_B, _T)) < 0.1
    weights_BT = np.ones((_B, _T), np.float32)
    weights_BT[::2, 7 + step :] = 0
    batch = dict(
      tokens=tokens_BW[:, :-1],
      targets=tokens_BW[:, 1:],
      weights=weights_BT,
      segment_ids=np.cumsum(starts_BT, axis=1, dtype=np.int32),
    )
    return {name: x[start:stop] for name, x in batch.items()}


def _text(mesh: MeshConfig, loss_chunks: int) -> RunConfig:
  return RunConfig(
    model=ModelConfig(
      first=BaseConvConfig(),
      second=ReBasedConfig(heads=2, features=4),
      vocab_size=_V,
      width=16,
      positions=_T,
    ),
    data=TextData(length=_T, packing="documents", recall="bigram"),
    optimizer=OptimizerConfig(),
    steps=1,
    batch=_B,
    loss_chunks=loss_chunks,
    mesh=mesh,
  )


def _recall(mesh: MeshConfig, loss_chunks: int) -> RunConfig:
  return tiny(mesh=mesh, loss_chunks=loss_chunks)


def _evaluate(config: RunConfig, devices: int) -> dict[str, float]:
  text = isinstance(config.data, TextData)
  data = _Rows() if text else config.data.eval_batches(config.micro_batch, 0)
  mesh = mesh_lib.make_mesh(config.mesh, jax.devices()[:devices])
  with jax.set_mesh(mesh):
    built = compiled_steps.build(config, mesh)
    params = compiled_steps.fresh_state(config, built).params
    return evaluate.evaluate(built, params, data)


@functools.cache
def _on_one_device(make) -> dict[str, float]:
  return _evaluate(make(MeshConfig(), 1), 1)


@pytest.mark.parametrize(
  "mesh",
  [
    MeshConfig(),
    MeshConfig(context=8),
    MeshConfig(fsdp=2, tensor=2, context=2),
  ],
  ids=lambda mesh: "-".join(f"{k}{v}" for k, v in mesh.sizes(8).items()),
)
@pytest.mark.parametrize(
  ("make", "loss_chunks"), [(_text, 1), (_text, 2), (_recall, 2)]
)
def test_every_metric_is_that_of_one_device(
  make, loss_chunks: int, mesh: MeshConfig, monkeypatch
) -> None:
  monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, _SURPRISE))
  expected = _on_one_device(make)
  found = _evaluate(make(mesh, loss_chunks), 8)
  assert found.keys() == expected.keys()
  assert found.keys() - {"tokens"} == {
    x.name
    for x in metrics.METRICS
    if isinstance(x, TargetMetric) and (make is _text or not x.needs_recall)
  }
  real = sum(_Rows().read(step)["weights"].sum() for step in range(2))
  assert found["tokens"] == expected["tokens"]
  assert found["tokens"] == (real if make is _text else 20 * 2)
  assert 0.05 < found.get("ar_share", 0.5) < 0.95
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
