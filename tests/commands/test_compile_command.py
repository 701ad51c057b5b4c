"""Test `rebased compile`; compiling for TPUs needs libtpu."""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_cases import (
  command,
  finish,
  flags,
  tiny,
  trainer as trainer,
)

from train import compiled_steps
from train.compile import collectives, report
from train.devices import batch_sharding, mesh as mesh_lib, peaks
from train.devices.mesh import MeshConfig

_HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None


def test_measurements_are_of_one_device() -> None:
  split = jax.NamedSharding(mesh_lib.make_mesh(), jax.P("data"))
  x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=split)
  call = lambda x: (2 * x, jnp.square(x).sum())
  found = report.measure(jax.jit(call, donate_argnums=0).lower(x).compile(), 8)
  assert found.arguments == 64 * 32 * 4 // 8
  assert found.memory < 3 * found.arguments  # what is donated counts once
  assert found.traffic == {"all-reduce": report.Traffic(1, 4, 2 * 7 / 8 * 4)}


def test_the_compiled_step_is_the_one_that_runs() -> None:
  config = tiny(mesh=MeshConfig(data=2, fsdp=2, tensor=2))
  mesh = mesh_lib.make_mesh(config.mesh)
  lowered = report.lower(report.trace(config, mesh), mesh).as_text()
  with jax.set_mesh(mesh):
    built = compiled_steps.build(config, mesh)
    batch = batch_sharding.put_batch(
      config.data.train_batches(8, 0).read(0), mesh
    )
    state = compiled_steps.fresh_state(config, built)
    run = built.train_step.lower(state, batch, built.key).as_text()
  assert lowered == run
  for name, x in config.data.fields(8).items():
    assert (x.shape, x.dtype) == (batch[name].shape, str(batch[name].dtype))
    assert isinstance(np.zeros(x.shape, x.dtype), np.ndarray)


def test_a_report_is_about_one_device(monkeypatch) -> None:
  """A TPU7x chip has 192 GiB, of which each of its two devices has a half."""
  tpu = jax.sharding.AbstractDevice("TPU7x", 1, "tpu")
  memory, flops = peaks.memory, peaks.flops
  monkeypatch.setattr(peaks, "memory", lambda device: memory(tpu))
  monkeypatch.setattr(peaks, "flops", lambda device: flops(tpu))
  found = report.report(tiny(), mesh_lib.make_mesh())
  assert found.limit == 103_000_000_000 and found.fits
  assert found.seconds == found.products / 1155e12
  for gib, fits in ((95, True), (97, False)):
    measured = dataclasses.replace(found.found, temporary=gib * report.GIB)
    assert dataclasses.replace(found, found=measured).fits == fits
    unknown = dataclasses.replace(found, found=measured, limit=None)
    assert unknown.fits
  assert not dataclasses.replace(found, found=None, reason="too big").fits


def test_a_tensor_axis_gathers_only_the_convolution() -> None:
  """Norms and MLPs work on activations that are whole on every device."""
  config = tiny(
    model=dict(width=32, mlp_width=64, pairs=3),
    mesh=MeshConfig(data=2, tensor=4),
  )
  mesh = mesh_lib.make_mesh(config.mesh)
  compiled = report.lower(report.trace(config, mesh), mesh).compile()
  rows, loop = 8 // 2 * 16 * 32 * 4, 2  # bytes of x_BTD; pairs but the last
  gathers = [
    x
    for x in collectives.find(compiled.as_text(), 8)
    if (x.kind, x.size, x.devices, x.times) == ("all-gather", rows, 4, loop)
  ]
  assert len(gathers) <= 4  # its output and gradients, two in the backward


def _compile(cache, *options: str) -> tuple[int, str, str]:
  args = ("compile", "mqar", *flags(tiny()), *options)
  return finish(command(*args, cache=cache))


@pytest.mark.skipif(_HAS_LIBTPU, reason="libtpu is installed")
def test_without_libtpu_compile_says_so(trainer) -> None:
  code, out, err = _compile(trainer)
  assert (code, out) == (2, "")
  assert err.startswith("rebased: rebased compile needs libtpu")
  assert "Traceback" not in err and len(err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.skipif(not _HAS_LIBTPU, reason="libtpu is not installed")
def test_compile_for_a_slice_that_is_not_attached(trainer) -> None:
  code, out, err = _compile(
    trainer, "--topology", "v5e:2x4", "--mesh.fsdp", "4", "--mesh.context", "2"
  )
  assert code == 0, err
  assert "8 × TPU v5 lite" in out and "mesh: fsdp 4 × context 2" in out
  assert re.search(r"it fits: 0\.\d+ GiB of 16 GiB", out)
  assert "all-gather" in out and "collective-permute" in out
  code, _, err = _compile(trainer, "--topology", "v5e:3x")
  assert code == 2 and "topology='v5e:3x': expected the name of a slice" in err
  big = ("--model.width", "32768", "--model.pairs", "4")
  code, out, err = _compile(trainer, "--topology", "v5e:2x2", *big)
  assert code == 1 and "does not fit" in out, err
