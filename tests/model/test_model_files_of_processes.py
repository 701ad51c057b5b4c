"""Exported models that are written and read by two processes."""

import json
import os
from pathlib import Path
import socket
import subprocess
import sys

from flax import nnx
import jax
import numpy as np
import pytest

import rebased_jax
from rebased_jax import (
  LM,
  BaseConvConfig,
  ModelConfig,
  ReBasedConfig,
  memory,
)

pytestmark = pytest.mark.slow

_CONFIG = ModelConfig(
  first=BaseConvConfig(),
  second=ReBasedConfig(heads=2, features=4),
  vocab_size=11,
  width=8,
  pairs=2,
  mlp_width=16,
)

# Two devices each. Arguments: address, process, kind of axes, folder.
_PROCESS = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
address, process, kind, folder = sys.argv[1:]
jax.distributed.initialize(address, 2, int(process))
import json
from pathlib import Path
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import rebased_jax
from rebased_jax import memory, tensor_files
from rebased_jax.parameter_axes import axis_names

folder, reads = Path(folder), []
check = tensor_files._check_finite
def count(name, x, starts):
  reads.append(x.nbytes)
  check(name, x, starts)
tensor_files._check_finite = count

axis_type = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}[kind]
mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(axis_type,) * 2)
rules = {"embed": "fsdp", "vocab": "fsdp", "mlp": "tensor", "heads": "tensor"}

def place(path, x):
  names = axis_names(path, len(x.shape))
  even = [i % 2 == 0 and rules.get(n) for i, n in zip(x.shape, names)]
  # The same mesh axis cannot split two axes of an array.
  spec = [n if n and n not in even[:i] else None for i, n in enumerate(even)]
  return NamedSharding(mesh, PartitionSpec(*spec))

def refusal(call, *args, **kwargs):
  try:
    call(*args, **kwargs)
  except (ValueError, RuntimeError) as error:
    return f"{type(error).__name__}: {error}"

model = rebased_jax.load(folder / "whole", sharding=place)
found = {"read": sum(reads)}
with jax.set_mesh(mesh):
  rebased_jax.save(model, folder / "one", tokenizer="bytes")
  rebased_jax.save(model, folder / "several", max_file_bytes=1000)
  state = jax.jit(
    lambda: model.init_state(2),
    out_shardings=NamedSharding(mesh, PartitionSpec()),
  )()
  memory.save(model, state, folder / "state")
found["again"] = refusal(rebased_jax.save, model, folder / "one")
found["options"] = refusal(rebased_jax.save, model, folder / "x", eos=3)
model.norm.scale[...] = model.norm.scale[...] * np.nan
found["nan"] = refusal(
  rebased_jax.save, model, folder / "x", max_file_bytes=1000
)
wrong = folder / ("wrong" if process == "1" else "whole")
found["one reads"] = refusal(rebased_jax.load, wrong, sharding=place)
found["left"] = sorted(x.name for x in folder.iterdir())
print(json.dumps(found))
"""


def _together(kind: str, folder: Path) -> list[dict]:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  started = [
    subprocess.Popen(
      [sys.executable, "-c", _PROCESS, address, str(i), kind, str(folder)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=environment,
    )
    for i in range(2)
  ]
  try:
    ends = [x.communicate(timeout=120) for x in started]
  finally:
    for process in started:
      process.kill()
  for process, (_, errors) in zip(started, ends, strict=True):
    assert process.returncode == 0, errors
  return [json.loads(out.splitlines()[-1]) for out, _ in ends]


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_two_processes_write_one_model(tmp_path: Path, kind: str) -> None:
  model = LM(_CONFIG, rngs=nnx.Rngs(0))
  rebased_jax.save(model, tmp_path / "whole")
  rebased_jax.save(model, tmp_path / "wrong")
  (tmp_path / "wrong" / "model.safetensors").write_bytes(b"0")
  whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
  first, second = _together(kind, tmp_path)

  size = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
  for found in (first, second):
    assert size / 4 < found["read"] < size
    # A folder that failed leaves nothing.
    assert found["left"] == ["one", "several", "state", "whole", "wrong"]
  assert (tmp_path / "one" / "model.safetensors").read_bytes() == whole
  several = rebased_jax.load(tmp_path / "several")
  for found, wanted in zip(
    jax.tree.leaves(nnx.state(several)),
    jax.tree.leaves(nnx.state(model)),
    strict=True,
  ):
    np.testing.assert_array_equal(found, wanted)
  assert len(list((tmp_path / "several").iterdir())) > 3
  state = memory.load(model, tmp_path / "state")
  assert state.position_B.shape == (2,)

  other = "OtherProcessFailed: process {} of 2 failed"
  for key, words in (
    ("again", "one is not empty: expected a new folder"),
    ("options", "WeightsError: eos=3: expected None"),
    ("nan", "WeightsError: norm.scale has 8 values that are not finite"),
  ):
    assert words in first[key], first
    assert second[key].startswith(other.format(0)), second
  assert "cannot be read" in second["one reads"], second
  assert first["one reads"].startswith(other.format(1)), first
