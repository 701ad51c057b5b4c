"""A run traces and compiles its two steps once, however often it evaluates."""

import collections
from pathlib import Path

import chex
import jax
import pytest
from train_cases import run, tiny, trainer as trainer

from train import step

_EVENT = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compiled():
  """Yield how often each function was compiled so far, by name."""
  count = collections.Counter()

  def listen(event: str, seconds: float, **fields) -> None:
    if event == _EVENT:
      count[fields["fun_name"]] += 1

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield count
  jax.monitoring.unregister_event_duration_listener(listen)


def _steps(count) -> dict[str, int]:
  """Return the counts of the two steps, whatever their names are wrapped in."""
  return {
    name: sum(n for key, n in count.items() if name in key)
    for name in ("train_step", "eval_step")
  }


@pytest.mark.quick
def test_each_step_compiles_once_in_a_run_and_in_a_resume(
  compiled, tmp_path: Path
) -> None:
  # 20 held-out rows in batches of 8: the last one is padded.
  outcome, _ = run(tiny(), tmp_path / "run")
  assert outcome.step == 6
  assert _steps(compiled) == {"train_step": 1, "eval_step": 1}
  assert sum(compiled.values()) > 2  # the events are those of compilations

  compiled.clear()
  newest = tmp_path / "run" / "checkpoints" / "6"
  newest.rename(tmp_path / "away")
  outcome, out = run(tiny(), tmp_path / "run")
  assert outcome.step == 6 and "resuming at step 4" in out
  assert _steps(compiled) == {"train_step": 1, "eval_step": 1}


def test_each_step_is_traced_once(tmp_path: Path, monkeypatch) -> None:
  """The trace that is tried before the folder is made is used for training."""
  for name in ("train_step", "eval_step"):
    once = chex.assert_max_traces(getattr(step, name), n=1)
    monkeypatch.setattr(step, name, once)
  outcome, _ = run(tiny(), tmp_path / "run")
  assert outcome.step == 6
