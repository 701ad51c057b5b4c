"""Test `prepare` with Apache Beam; skipped if it is not installed."""

import sys

from prepare_cases import jsonl, records, run, tree, write_formats
import pytest

from train.data.prepare import beam
from train.data.prepare.shard import PrepareError

_BEAM = dict(runner="beam", beam_options=("runner=DirectRunner",))


def test_without_beam_it_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "apache_beam", None)
  write_formats(tmp_path / "in")
  with pytest.raises(ValueError, match=r"rebased-jax\[beam\]"):
    run([tmp_path / "in"], tmp_path / "out", **_BEAM)
  with pytest.raises(ValueError, match=r"beam_options=\('runner=x',\)"):
    run([tmp_path / "in"], tmp_path / "out", beam_options=("runner=x",))


@pytest.mark.filterwarnings("ignore")  # warnings of Beam itself
def test_beam_makes_the_same_bytes(tmp_path):
  pytest.importorskip("apache_beam")
  write_formats(tmp_path / "in")
  run([tmp_path / "in"], tmp_path / "whole")
  bad = tmp_path / "bad"
  bad.mkdir()
  (bad / "x.jsonl").write_bytes(jsonl([*records(2), dict(text=3)]))
  run([tmp_path / "in"], tmp_path / "out", **_BEAM)
  assert tree(tmp_path / "out") == tree(tmp_path / "whole")
  with pytest.raises(
    PrepareError,
    match=r"^x.jsonl, line 3 .* type int: [a-z ]*; --on-error skip [a-z ]*$",
  ):
    run([bad], tmp_path / "none", **_BEAM)


def test_the_message_is_that_of_the_worker():
  said = "x.jsonl, line 3: text is null"
  inner = f"{said} [while running 'write_shard']"
  assert beam.message(PrepareError(inner)) == said
  trace = f"Traceback\n  File x\ntrain.PrepareError: {inner}\n\nmore"
  assert beam.message(RuntimeError(trace)) == said
  assert beam.message(RuntimeError("no worker came")) == "no worker came"
