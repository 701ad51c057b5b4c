"""Every system of the paper: one command trains it, another counts it."""

from pathlib import Path
import re

import jax
import jax.numpy as jnp
import numpy as np
from paper_tables import PARAMETERS
import pytest
from train_cases import call as call, metrics, trainer as trainer

import rebased_jax
from rebased_jax import presets
from train.records.run_folder import RunFolder

_SIZES = [
  "--model.width=16",
  "--model.vocab-size=32",
  "--model.positions=8",
  "--data.vocab-size=32",
  "--data.length=8",
  "--data.pairs=2",
  "--data.test-examples=64",
  "--batch=64",
  "--steps=40",
  "--eval-every=40",
  "--save-every=40",
  "--log-every=5",
  "--optimizer.warmup-steps=10",
  "--optimizer.learning-rate=1e-2",
]
# Nats. In so short a run a model learns that answers are among the 16 values,
# not the 32 tokens, worth ln 2 = 0.69. A third of it is left for noise.
_MARGIN = 0.46


# The paper's own two, attention after a short convolution, and Mamba, the only
# block of another form. The tests of mixers check every mixer's gradients.
_QUICK = ("rebased", "based", "conv-attention", "mamba")


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(x, marks=[pytest.mark.slow] * (x not in _QUICK))
    for x in presets.SYSTEMS
  ],
)
def test_a_short_run_of_each_system_learns(call, name: str, tmp_path) -> None:
  path = tmp_path / "run"
  code, _, err = call("train", f"mqar-{name}", *_SIZES, f"--run-dir={path}")
  assert code == 0, err
  model = RunFolder(path).read_config().model
  found = type(model.first), type(model.second), model.block
  system = presets.SYSTEMS[name]
  assert found == (type(system.first), type(system.second), system.block)
  first, *_, last = (loss for _, loss in metrics(path))
  ((_, held_out),) = metrics(path, "eval")
  assert max(last, held_out) <= first - _MARGIN, (first, last, held_out)
  _check_export(call, path, tmp_path / "exported")


def _check_export(call, path: Path, out: Path) -> None:
  """Check that an exported model has bit-identical logits."""
  code, _, err = call("export", str(path), "--out", str(out))
  assert code == 0, err
  model, loaded = rebased_jax.load(path), rebased_jax.load(out)
  logits = jax.jit(lambda model, tokens_BT: model(tokens_BT))
  tokens_BT = jnp.arange(16).reshape(2, 8)
  np.testing.assert_array_equal(
    logits(loaded, tokens_BT), logits(model, tokens_BT)
  )


@pytest.mark.parametrize("name", presets.make_models())
def test_inspect_counts_the_models_of_the_tables(call, name: str) -> None:
  code, out, _ = call("inspect", name, "--all")
  assert code == 0 and f"counts {PARAMETERS[name]:,} parameters" in out
  counts = re.findall(r"│ (\S+) +│ [^│]*│ +([\d,]+) │", out)
  *groups, (last, total) = [(x, int(n.replace(",", ""))) for x, n in counts]
  assert last == "all" and sum(n for _, n in groups) == total
  assert total == PARAMETERS[name]
  assert {"token_embedding", "pairs/second/norm1/scale"} <= dict(groups).keys()
  assert re.search(r"state of a sequence: [\d,]+ bytes", out)


def test_inspect_shows_a_table_beside_the_paper(call) -> None:
  code, out, _ = call("inspect", "table-9")
  assert code == 0
  for system in ("attention", "based", "rebased"):
    count = f"{PARAMETERS[f'table-9-{system}']:,}"
    assert re.search(rf"table-9-{system} +│ +{count} │ +{count} │ +0 │", out)
  assert presets.PUBLISHED_PARAMETERS == PARAMETERS


def test_inspect_of_an_unknown_model_names_a_near_one(call) -> None:
  code, _, err = call("inspect", "table-4-mamba-63")
  assert code == 2 and "did you mean 'table-4-mamba-64'" in err


@pytest.mark.parametrize(
  ("system", "option", "value", "words"),
  [
    ("hyena", "length", "8", "a row of 32 tokens: Hyena's filter has 8 lags"),
    ("rebased", "implementation", "gpu", "implementation='gpu' needs"),
    ("attention", "implementation", "cudnn", "='cudnn' needs a GPU"),
  ],
)
def test_a_refused_step_leaves_no_folder(
  call, system, option, value, words
) -> None:
  code, _, err = call(
    "train", f"mqar-{system}", "--batch", "8", f"--model.second.{option}", value
  )
  assert code == 2 and words in err
  assert list(Path.cwd().iterdir()) == []


def test_inspect_data_without_a_path_asks_for_one(call) -> None:
  code, out, err = call("inspect", "data")
  assert code == 2 and "PATH" in out + err and "preset" not in out + err
