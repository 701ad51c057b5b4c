"""Test the lines about a run's progress where there is no bar."""

import io
import time

from rich.console import Console

from train.heartbeat import Heartbeat
from train.progress import Display
from train.watchdog import Watchdog


def _start(every: float, watch: Watchdog | None = None):
  text = io.StringIO()
  console, watch = Console(file=text, width=80), watch or Watchdog()
  heartbeat = Heartbeat(console, watch.doing, every=every)
  display = Display(console, heartbeat, start=3, steps=9, active=True)
  return heartbeat, display, text


def _wait_for(text: io.StringIO, expected: str) -> None:
  end = time.monotonic() + 20
  while expected not in text.getvalue():
    assert time.monotonic() < end, text.getvalue()
    time.sleep(0.01)


def test_a_silent_run_says_what_it_does() -> None:
  watch = Watchdog()
  heartbeat, display, text = _start(0.05, watch)
  with heartbeat:
    watch.beat("start of the data")
    _wait_for(text, "start of the data: 0 s so far\n")
    with display:
      watch.beat("compilation and step 3")
      _wait_for(text, "compilation and step 3: 0 s so far\n")
      watch.beat("step 4", training=True)
      display.step(4, None)
      _wait_for(text, "step 4/9  left –\n")
      display.step(5, None)
      _wait_for(text, "step 5/9  left 0:0")
      watch.beat("evaluation", part="batch 2 of 7")
      _wait_for(text, "evaluation, batch 2 of 7: 0 s so far\n")


def test_a_run_that_prints_needs_no_further_lines() -> None:
  heartbeat, display, text = _start(1e6)
  with heartbeat, display:
    display.line("[mine]")
  assert text.getvalue() == "[mine]\n"


def test_the_first_line_may_come_sooner_than_others() -> None:
  text = io.StringIO()
  lines = iter(("one", "two"))
  console = Console(file=text, width=80)
  with Heartbeat(console, lambda: next(lines), every=1e6, first=0.01):
    _wait_for(text, "one\n")
    time.sleep(0.05)
  assert text.getvalue() == "one\n"


def test_a_phase_lasts_until_the_next(monkeypatch) -> None:
  clock = [0.0]
  monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
  watch = Watchdog()
  for part, second in (("batch 1 of 2", 3), ("batch 2 of 2", 40)):
    clock[0] = second
    watch.beat("evaluation", part=part)
  clock[0] = 45
  assert watch.doing() == "evaluation, batch 2 of 2: 42 s so far"
  watch.beat("step 7", training=True)
  assert watch.doing() is None


def test_the_time_left_does_not_count_the_compilation(monkeypatch) -> None:
  times = iter((600.0, 602.0, 604.0))
  heartbeat, display, text = _start(1e6)
  monkeypatch.setattr(time, "perf_counter", lambda: next(times))
  values = dict(loss=1.0, accuracy=0.5, tokens_per_second=2000.0)
  with heartbeat, display:
    for step in (4, 5, 6):
      display.step(step, values)
  lefts = [row.rpartition("left ")[2] for row in text.getvalue().splitlines()]
  assert lefts == ["–", "0:00:08", "0:00:06"]
