"""Commands whose standard output loses its reader, or is closed or full."""

import contextlib
import os
from pathlib import Path
import subprocess
import sys

import pytest
from train_cases import ROOT, flags, run, saved_bits, tiny, trainer as trainer

from train import cli, console, start_run
from train.checkpoint.checkpoints import read_meta
from train.records.run_folder import RunFolder

_CONFIG = tiny(eval_every=3, save_every=100)


def _code_without_reader(*words: str) -> int:
  """Run a command whose standard output is a pipe that nobody reads."""
  reader, writer = os.pipe()
  os.close(reader)
  with (
    os.fdopen(writer, "w") as stream,
    contextlib.redirect_stdout(stream),
    pytest.raises(SystemExit) as end,
  ):
    cli.main(words)
  return end.value.code


@pytest.mark.parametrize(
  "words",
  [
    ("--help",),
    ("train", "--help"),
    ("train", "mqar", "--help"),
    ("presets",),
    ("tokenizer",),
    ("inspect", "mqar"),
    ("doctor",),
  ],
  ids=" ".join,
)
def test_a_command_ends_quietly(capfd, words) -> None:
  assert _code_without_reader(*words) == 141
  assert capfd.readouterr().err == ""


def test_a_process_ends_quietly() -> None:
  """Python itself flushes standard output at its end, too."""
  code = "from train.cli import main; main()"
  for words, redirect, expected in (
    (["--help"], "| true", (141, "")),
    (["--help"], ">&-", (0, "")),
    (["tokenizer"], "2>&1 | true", (141, "")),
    (["--help"], "> /dev/full", (1, "No space left on device")),
  ):
    line = f'"$0" -c "$1" {words[0]} {redirect}; exit ${{PIPESTATUS[0]}}'
    found = subprocess.run(
      ["bash", "-c", line, sys.executable, code],
      cwd=ROOT,
      capture_output=True,
      text=True,
      timeout=60,
    )
    assert found.returncode == expected[0], (redirect, found.stderr)
    assert expected[1] in found.stderr
    assert "Traceback" not in found.stderr and "ignored" not in found.stderr
    assert (found.stderr == "") == (expected[1] == "")


def test_a_run_without_a_reader_is_saved_and_resumed(
  tmp_path: Path, capfd
) -> None:
  folder = tmp_path / "run"
  words = ("train", "mqar", *flags(_CONFIG), "--run-dir", str(folder))
  assert _code_without_reader(*words) == 141
  err = capfd.readouterr().err
  assert err.startswith("nobody reads the output: stopped at step 0 and saved")
  assert f"rebased resume {folder}" in err
  assert read_meta(folder / "checkpoints")[0] == 0
  assert start_run.run(_CONFIG, folder).reason == "finished"
  run(_CONFIG, tmp_path / "undisturbed")
  assert saved_bits(folder, _CONFIG) == saved_bits(
    tmp_path / "undisturbed", _CONFIG
  )
  steps = [x["step"] for x in RunFolder(folder).read_metrics()]
  assert sorted(steps) == [1, 2, 3, 3, 4, 5, 6, 6]


def test_output_drops_text_once_it_is_lost() -> None:
  class Terminal:
    """Stands for a terminal that goes away after a first line."""

    written, encoding = "", "ascii"

    def write(self, text: str) -> None:
      if self.written:
        raise OSError(5, "Input/output error")
      self.written += text

    def flush(self) -> None:
      self.write("")

    def fileno(self) -> int:
      raise OSError

  stream, errors = Terminal(), []
  output = console.Output(stream, errors.append)
  assert output.encoding == "ascii"
  assert output.write("one") == 3 and not output.lost
  output.writelines(["two", "three"])
  output.flush()
  assert output.lost and stream.written == "one"
  (error,) = errors
  assert "Input/output error" in str(error)
  inner = console.Output(stream, cli._raise)
  output = console.Output(inner, errors.append)
  output.write("four")
  assert inner.lost and output.lost and len(errors) == 2
