"""A process that hangs ends by itself, and says where it hung."""

import io
from pathlib import Path
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console
from train_cases import ROOT, tiny, trainer as trainer

from train import start_run, watchdog
from train.records.metrics_writer import Window
from train.records.run_folder import RunFolder
from train.watchdog import EXIT_HUNG, Watchdog


@pytest.fixture
def ends(monkeypatch) -> list[tuple[str, int]]:
  """Record how the watchdog ends the process instead of ending it."""
  found: list[tuple[str, int]] = []
  monkeypatch.setattr(watchdog, "end_process", lambda *end: found.append(end))
  return found


def _wait_for(ends: list) -> None:
  deadline = time.monotonic() + 10
  while not ends and time.monotonic() < deadline:
    time.sleep(0.01)


def test_a_phase_that_lasts_too_long_is_named(ends, monkeypatch) -> None:
  told: list[int] = []  # the other processes of the run
  monkeypatch.setattr(watchdog.processes, "say_end", told.append)
  with Watchdog(0.3) as watch:
    watch.beat("save of step 4")
    _wait_for(ends)
  message, code = ends[0]
  assert code == told[0] == EXIT_HUNG == 4
  assert "no progress for 0.3 s (--step-timeout) in: save of step 4" in message
  assert "rebased resume" in message
  ends.clear()
  with Watchdog(0.1, "nothing was changed"):
    _wait_for(ends)
  assert ends[0][0].endswith(" in: start; nothing was changed")


def test_progress_and_the_end_keep_the_process(ends) -> None:
  with Watchdog(0.4) as watch:
    for step in range(20):
      time.sleep(0.05)
      watch.beat(f"step {step}")
  time.sleep(0.6)
  with Watchdog(None):
    time.sleep(0.1)
  assert ends == []


@pytest.mark.parametrize("limit", [0, -1.0])
def test_the_limit_must_be_positive(limit: float) -> None:
  with pytest.raises(
    ValueError, match="step_timeout=.*expected None or a number"
  ):
    Watchdog(limit)


_STOPPED = """
import time
from train.watchdog import Watchdog
with Watchdog(1.0) as watch:
  watch.beat("step 1")
  print("ready", flush=True)
  time.sleep(0.7 if {returns} else 30)
print("done")
"""


@pytest.mark.parametrize("returns", [True, False])
def test_time_in_which_the_process_is_stopped_does_not_count(
  returns: bool,
) -> None:
  """A stop of 2 s is longer than the limit; only a real hang ends it."""
  process = subprocess.Popen(
    [sys.executable, "-c", _STOPPED.format(returns=returns)],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "ready\n"
  process.send_signal(signal.SIGSTOP)
  time.sleep(2)
  process.send_signal(signal.SIGCONT)
  out, err = process.communicate(timeout=120)
  if returns:
    assert (process.returncode, out, err) == (0, "done\n", "")
  else:
    assert process.returncode == EXIT_HUNG and "in: step 1;" in err


def test_every_phase_of_a_run_is_told(
  tmp_path: Path, trainer, monkeypatch
) -> None:
  class Recorder(Watchdog):
    def beat(self, phase: str, *, part="", training: bool = False) -> None:
      super().beat(phase, part=part, training=training)
      if phases[-1:] != [phase]:
        phases.append(phase)

  phases: list[str] = []
  pauses: list[str] = []  # the phases that the rates leave out
  pause = Window.pause
  monkeypatch.setattr(
    Window,
    "pause",
    lambda self, x: (pauses.append(phases[-1]), pause(self, x))[1],
  )
  config = tiny(steps=3, eval_every=2, save_every=2)
  start_run.train(
    config,
    RunFolder(tmp_path / "run"),
    Console(file=io.StringIO()),
    Recorder(),
  )
  for expected in (
    ["initial state", "data of step 0", "compilation and step 0"],
    ["data of step 1", "step 1"],
    ["evaluation", "save of step 2"],
    ["evaluation", "save of step 3", "last save"],
  ):
    assert any(
      phases[i : i + len(expected)] == expected for i in range(len(phases))
    ), phases
  assert pauses == [
    "compilation and step 0",
    *("evaluation", "save of step 2", "evaluation", "save of step 3"),
  ]
  records = RunFolder(tmp_path / "run").read_metrics()
  shares = [x["goodput"] for x in records if x["kind"] == "train"]
  assert len(shares) == 3 and all(0 < x < 1 for x in shares)


def test_goodput_is_the_share_of_the_steps(monkeypatch) -> None:
  clock = [0.0]
  monkeypatch.setattr(watchdog.time, "perf_counter", lambda: clock[0])
  watch = Watchdog()
  # (phase, whether it trains, its seconds); 6 of 20 seconds are training.
  for phase, training, seconds in (
    ("compilation and step 0", False, 9.0),
    ("step 1", True, 2.0),
    ("data of step 2", False, 1.0),
    ("step 2", True, 3.0),
    ("save of step 3", False, 4.0),
    ("step 3", True, 1.0),
  ):
    watch.beat(phase, training=training)
    clock[0] += seconds
  assert watch.goodput() == pytest.approx(6 / 20)
  clock[0] += 5  # the last phase goes on
  assert watch.goodput() == pytest.approx(11 / 25)
  # The question leaves the answer of `doing` as it was.
  watch.beat("evaluation", part="batch 3 of 9")
  clock[0] += 2
  watch.goodput()
  assert watch.doing() == "evaluation, batch 3 of 9: 2 s so far"
