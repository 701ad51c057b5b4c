"""Commands without a device, on an ASCII terminal, and stopped at the start."""

import io
import os
from pathlib import Path
import signal
import subprocess
import sys

import jax
import pytest
from train_cases import ROOT, call as call, tiny, trainer as trainer

from train import cli
from train.data import prefetch
from train.records.run_folder import RunFolder
from train.stop_signals import StopSignals, leaving_at_signals


@pytest.mark.parametrize(
  ("error", "why"),
  [
    (AssertionError(), "its plugin is not installed"),
    (RuntimeError("Unable to initialize\nmore"), "Unable to initialize"),
  ],
)
def test_a_machine_without_devices(
  call, monkeypatch, tmp_path: Path, error: Exception, why: str
) -> None:
  folder = tmp_path / "run"
  folder.mkdir()
  RunFolder(folder).open(tiny())

  def fail() -> None:
    raise error

  monkeypatch.setattr(jax, "devices", fail)
  monkeypatch.setenv("JAX_PLATFORMS", "cuda")
  line = f"jax finds no device with JAX_PLATFORMS='cuda': {why}\n"
  code, out, err = call("doctor")
  assert (code, err) == (1, "") and f"devices: none: {line}" in out
  assert "orbax-checkpoint" in out
  for args in (
    ("train", "mqar", "--run-dir", "new"),
    ("resume", str(folder)),
    ("evaluate", str(folder)),
    ("generate", str(folder), "--prompt", "a"),
    ("inspect", "mqar"),
  ):
    assert call(*args) == (2, "", f"rebased: {line}"), args
  assert list(Path().iterdir()) == []


@pytest.mark.parametrize("args", [["--help"], ["prepare", "--help"]])
def test_an_ascii_terminal_gets_escapes(monkeypatch, args: list[str]) -> None:
  written = io.BytesIO()
  monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
  with pytest.raises(SystemExit) as exit:
    cli.main(args)
  sys.stdout.flush()
  assert exit.value.code == 0
  assert "usage: rebased" in written.getvalue().decode("ascii")
  if args == ["--help"]:
    assert "usage: rebased VERB \\u2026" in written.getvalue().decode("ascii")


_INTERRUPTED = """
import dataclasses, hashlib, os, signal, sys, threading, types
from train import cli

def run(args):
  send = lambda: os.kill(os.getpid(), int(sys.argv[1]))
  threading.Timer(0.1, send).start()
  try:
    # Does not return to Python, as a compilation does not.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
  except BaseException as error:  # as an import that is interrupted
    raise AttributeError("module 'jax' has no attribute 'core'") from error

slow = types.ModuleType("slow")
slow.run = run
sys.modules["slow"] = slow
cli.VERBS["train"] = dataclasses.replace(cli.VERBS["train"], module="slow")
cli.main(["train", "mqar"])
"""


@pytest.mark.parametrize(
  "number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
)
def test_a_signal_at_the_start_is_one_line(number: signal.Signals) -> None:
  done = subprocess.run(
    [sys.executable, "-c", _INTERRUPTED, str(int(number))],
    capture_output=True,
    text=True,
    timeout=60,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )
  assert (done.returncode, done.stdout) == (128 + number, "")
  assert done.stderr == f"rebased: stopped by {number.name}\n"


def test_training_takes_all_signals_from_the_handler_of_the_start() -> None:
  before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
  try:
    with leaving_at_signals(lambda code: os._exit(99)), StopSignals() as stop:
      for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
        os.kill(os.getpid(), number)
      assert stop.signal_name == "SIGHUP"
  finally:
    signal.signal(signal.SIGHUP, before)


def test_the_handler_of_a_program_stays() -> None:
  """A script that calls the command may have its own handler of Ctrl-C."""
  seen = []
  mine = lambda *_: seen.append("mine")
  before = signal.signal(signal.SIGINT, mine)
  try:
    with leaving_at_signals(lambda code: None):
      os.kill(os.getpid(), signal.SIGINT)
    assert seen == ["mine"] and signal.getsignal(signal.SIGINT) is mine
  finally:
    signal.signal(signal.SIGINT, before)


def test_workers_do_not_hear_the_signals_that_stop_a_run() -> None:
  """They are started by `next`, and inherit what its thread blocks."""

  class Source:
    def __next__(self):
      return signal.pthread_sigmask(signal.SIG_BLOCK, ())

  before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
  blocked = prefetch._next(Source())
  assert blocked >= {signal.SIGINT, signal.SIGHUP, signal.SIGUSR1}
  assert signal.SIGTERM not in blocked  # grain ends workers with it
  assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


_QUICK = """
import sys
from train import cli

for words in (
  *([verb, "--help"] for verb in cli.VERBS),
  ["train", "mqar", "--help"],
  ["sweep", "mqar-paper-rebased-128", "--help"],
  ["train", "mqar", "--stepz", "3"],
  ["train", "mqar", "--steps", "x"],
  ["generate", "run", "--foo"],
  ["lm-eval", "run", "--device", "cpu"],
  ["lm-eval", "run", "--weights", "mean"],
  ["lm-eval", "run", "--step"],
  ["resume", "nothere"],
  ["evaluate", "nothere"],
  ["generate", "nothere", "--prompt", "a"],
  ["export", "nothere", "--out", "new"],
  ["inspect", "nothere"],
  ["import", "nothere", "--system", "rebased", "--out", "new"],
  ["import", "nothere", "--system", "rebasd", "--out", "new"],
):
  try:
    cli.main(words)
  except SystemExit as stop:
    assert stop.code == (0 if words[-1] == "--help" else 2), words
  for name in ("jax", "optax", "orbax", "grain", "matplotlib"):
    assert name not in sys.modules, (words, name)
"""


def test_help_and_wrong_options_do_not_wait_for_jax() -> None:
  done = subprocess.run(
    [sys.executable, "-c", _QUICK],
    capture_output=True,
    text=True,
    timeout=60,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )
  assert done.returncode == 0, done.stderr


def test_a_killed_worker_of_the_data_is_named() -> None:
  """As after the kernel's search for memory."""

  class Source:
    def __next__(self):
      raise RuntimeError(
        "Worker process was terminated unexpectedly with exit code -9. Search"
      )

  with pytest.raises(ChildProcessError, match="was ended by SIGKILL: expected"):
    prefetch._next(Source())
