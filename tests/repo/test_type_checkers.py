"""A user's script has right types for mypy and pyright, not `Any`.

CI runs it. A checker that is not installed is skipped.
"""

import importlib.util
from pathlib import Path
import subprocess
import sys

import pytest

_SCRIPT = """\
from flax import nnx
import jax

from pallas_kernels import polynomial_attention
from rebased_jax import LM, BaseConvConfig, ModelConfig, ReBasedConfig
from rebased_jax import generate, load
import train

config = ModelConfig(
  first=BaseConvConfig(),
  second=ReBasedConfig(heads=4),
  vocab_size=256,
  width=64,
)
model = LM(config, rngs=nnx.Rngs(0))
tokens = jax.random.randint(jax.random.key(0), (8, 65), 0, 256)
logits: jax.Array = model(tokens)
more: jax.Array = generate(model, tokens[:1], steps=5)
q = jax.numpy.ones((1, 8, 2, 4))
o: jax.Array = polynomial_attention(q, q, q)
outcome = train.run(train.make_presets()["mqar"], "runs/mine")
held_out: dict[str, float] = outcome.held_out
again: LM = load("runs/mine")
"""
# Each line is an error, which a checker that sees `Any` does not find.
_WRONG = """\
from rebased_jax import ModelConfig, ReBasedConfig, load
import train

ReBasedConfig(head=4)
ModelConfig(width="wide")
train.run(1)
number: int = load("runs/mine")
"""
_COMMANDS = {
  "mypy": ("--ignore-missing-imports", "--python-executable", sys.executable),
  "pyright": ("--pythonpath", sys.executable),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", _COMMANDS)
def test_a_script_of_a_user(name: str, tmp_path: Path) -> None:
  if importlib.util.find_spec(name) is None:
    pytest.skip(f"{name} is not installed")
  for file, text in (("right.py", _SCRIPT), ("wrong.py", _WRONG)):
    (tmp_path / file).write_text(text)
    found = subprocess.run(
      [sys.executable, "-m", name, *_COMMANDS[name], file],
      cwd=tmp_path,
      capture_output=True,
      text=True,
    )
    if file == "right.py":
      assert found.returncode == 0, found.stdout
      continue
    for line in range(4, 8):
      assert f"wrong.py:{line}:" in found.stdout, found.stdout
