"""Test the lines about a run's progress where there is no bar."""

import io
import time

from rich.console import Console

from train.progress import Display


def _display(every: float) -> tuple[Display, io.StringIO]:
  text = io.StringIO()
  console = Console(file=text, width=80)
  return Display(console, start=3, steps=9, active=True, every=every), text


def _wait_for(text: io.StringIO, expected: str) -> None:
  end = time.monotonic() + 20
  while expected not in text.getvalue():
    assert time.monotonic() < end, text.getvalue()
    time.sleep(0.01)


def test_a_silent_run_says_that_it_works() -> None:
  display, text = _display(0.05)
  with display:
    _wait_for(text, "compiling the step for 0 s\n")
    display.step(4, None)
    _wait_for(text, "step 4/9  left –\n")
    display.step(5, None)
    _wait_for(text, "step 5/9  left 0:0")


def test_the_time_left_does_not_count_the_compilation(monkeypatch) -> None:
  times = iter((600.0, 602.0, 604.0))
  monkeypatch.setattr(time, "perf_counter", lambda: next(times))
  display, text = _display(1e6)
  values = dict(loss=1.0, accuracy=0.5, tokens_per_second=2000.0)
  with display:
    for step in (4, 5, 6):
      display.step(step, values)
  lefts = [row.rpartition("left ")[2] for row in text.getvalue().splitlines()]
  assert lefts == ["–", "0:00:08", "0:00:06"]
