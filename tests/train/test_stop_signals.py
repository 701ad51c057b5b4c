"""Signals that stop a run, sent to real processes."""

import os
from pathlib import Path
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from train.stop_signals import StopSignals

_ROOT = Path(__file__).parents[2]
_HEAD = """
import os, signal, sys, threading, time
from train.stop_signals import StopSignals

def say(text):
  print(text, flush=True)
"""


def _start(body: str) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-c", _HEAD + textwrap.dedent(body)],
    cwd=_ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _ready(process: subprocess.Popen) -> None:
  assert process.stdout.readline() == "ready\n"


def _finish(process: subprocess.Popen) -> tuple[int, str, str]:
  out, err = process.communicate(timeout=120)
  return process.returncode, out, err


_LOOP = """
with StopSignals() as stop:
  say("ready")
  while not stop.requested:
    time.sleep(0.01)
  say(f"saved after {stop.signal_name}")
sys.exit(stop.exit_code)
"""


@pytest.mark.parametrize(
  "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]
)
def test_one_signal_lets_the_loop_finish(number: signal.Signals) -> None:
  process = _start(_LOOP)
  _ready(process)
  process.send_signal(number)
  code, out, err = _finish(process)
  assert (code, out) == (128 + number, f"saved after {number.name}\n")
  assert err == ""


# Holds the main thread in a computation, where Python handlers cannot run.
_JAX = """
import jax, jax.numpy as jnp
def spin(x):
  return jax.lax.fori_loop(0, 10**9, lambda i, a: a @ a * 0.5, x)
with StopSignals() as stop:
  def report():
    while not stop.requested:
      time.sleep(0.01)
    say("flag")
  threading.Thread(target=report, daemon=True).start()
  compiled = jax.jit(spin).lower(jnp.eye(64)).compile()
  say("ready")
  compiled(jnp.eye(64)).block_until_ready()
"""


@pytest.mark.parametrize(
  ("body", "first", "second"),
  [
    (_JAX, signal.SIGTERM, signal.SIGTERM),
    (_JAX, signal.SIGINT, signal.SIGTERM),
    (_JAX.replace("compiled(jnp", "time.sleep(60); (jnp"), 15, 15),
  ],
)
def test_second_signal_ends_at_once(body, first, second) -> None:
  process = _start(body)
  _ready(process)
  process.send_signal(first)
  assert process.stdout.readline() == "flag\n"
  process.send_signal(second)
  code, _, err = _finish(process)
  assert code == 128 + first
  assert "second signal" in err and "Traceback" not in err


def test_only_an_urgent_signal_ends_at_once() -> None:
  """A shell repeats SIGHUP, and SLURM sends SIGTERM after SIGUSR1."""
  process = _start("""
  os.close(2)  # nobody can read the last message
  with StopSignals() as stop:
    for name in ("SIGUSR1", "SIGHUP", "SIGHUP", "SIGUSR1", "SIGTERM"):
      os.kill(os.getpid(), getattr(signal, name))
      time.sleep(0.05)
    say(f"saved after {stop.signal_name}, {stop.exit_code}")
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)
  """)
  code, out, _ = _finish(process)
  assert (code, out) == (138, "saved after SIGUSR1, 138\n")


def test_an_ignored_hangup_stays_ignored() -> None:
  """As under nohup."""
  old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with StopSignals() as stop:
      os.kill(os.getpid(), signal.SIGHUP)
      time.sleep(0.05)
      assert not stop.requested
  finally:
    signal.signal(signal.SIGHUP, old)


def test_handlers_are_restored() -> None:
  numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
  before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
  try:
    old = [signal.getsignal(n) for n in numbers]
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    with StopSignals() as stop:
      assert all(signal.getsignal(n) not in old for n in numbers)
      assert not stop.requested and stop.exit_code == 0
      assert stop.signal_name is None
    now = [signal.getsignal(n) for n in numbers]
    assert now == old
    assert signal.set_wakeup_fd(wakeup) == wakeup
  finally:
    signal.signal(signal.SIGHUP, before)


def test_a_wakeup_descriptor_that_a_library_took_is_taken_back() -> None:
  """Without it no thread would count signals while the main one computes."""
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  try:
    with StopSignals() as stop:
      own = signal.set_wakeup_fd(writer)
      assert not stop.requested
      assert signal.set_wakeup_fd(own) == own != writer
  finally:
    os.close(reader)
    os.close(writer)


def test_handlers_are_restored_after_an_error() -> None:
  old = signal.getsignal(signal.SIGTERM)
  with pytest.raises(KeyError), StopSignals():
    raise KeyError
  assert signal.getsignal(signal.SIGTERM) == old


def test_default_behaviour_returns() -> None:
  process = _start("""
  with StopSignals():
    pass
  say("ready")
  time.sleep(60)
  """)
  _ready(process)
  process.send_signal(signal.SIGTERM)
  assert _finish(process)[0] == -signal.SIGTERM


def test_other_signals_do_not_count() -> None:
  process = _start("""
  seen = []
  signal.signal(signal.SIGUSR1, lambda *a: seen.append(1))
  with StopSignals() as stop:
    for _ in range(3):
      os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(3):
      os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.2)
    say(f"{len(seen)} {stop.requested}")
  """)
  code, out, _ = _finish(process)
  assert (code, out) == (0, "6 True\n")


def test_only_the_main_thread_may_enter() -> None:
  errors = []

  def enter() -> None:
    try:
      with StopSignals():
        pass
    except RuntimeError as error:
      errors.append(str(error))

  thread = threading.Thread(target=enter)
  thread.start()
  thread.join()
  assert errors == [
    "training handles SIGTERM and SIGINT, which Python allows in the main "
    "thread only: call train.run there"
  ]
