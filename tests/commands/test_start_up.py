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
import dataclasses, os, signal, sys, time, types
from train import cli

def run(args):
  try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
  except BaseException as error:  # as an import that is interrupted
    raise AttributeError("module 'jax' has no attribute 'core'") from error

slow = types.ModuleType("slow")
slow.run = run
sys.modules["slow"] = slow
cli.VERBS["train"] = dataclasses.replace(cli.VERBS["train"], module="slow")
cli.main(["train", "mqar"])
"""


def test_ctrl_c_at_the_start_is_one_line() -> None:
  done = subprocess.run(
    [sys.executable, "-c", _INTERRUPTED],
    capture_output=True,
    text=True,
    timeout=60,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )
  assert (done.returncode, done.stdout) == (130, "")
  assert done.stderr == "rebased: stopped\n"


def test_the_handler_of_a_program_stays() -> None:
  """A script that calls the command may have its own handler of Ctrl-C."""
  seen = []
  mine = lambda *_: seen.append("mine")
  before = signal.signal(signal.SIGINT, mine)
  try:
    with cli._leaving_at_ctrl_c():
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
  ["resume", "nothere"],
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
