"""The benchmark over real text: its corpus, its options, its end to end."""

import dataclasses
import json
from pathlib import Path
import subprocess
import sys
import time

import pytest
import tyro

from benchmarks.text import run as text_run
from train.commands.train import TrainArgs
from train.experiments import text_corpus
from train.presets import make_presets

ROOT = Path(__file__).parents[2]


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
  """Twenty documents of two packages, one a copy, and what is left out."""
  for number in range(20):
    text = f"# {number}\n" + "x = 1\n" * 100
    (tmp_path / f"{number}.py").write_text(text)
  (tmp_path / "copy.md").write_text((tmp_path / "0.py").read_text())
  (tmp_path / "short.py").write_text("x")
  (tmp_path / "latin.py").write_bytes("é".encode("latin-1") * 300)
  found = [
    (f"package{i % 2}", path)
    for i, path in enumerate(sorted(tmp_path.iterdir()))
  ]
  monkeypatch.setattr(text_corpus, "find", lambda packages: found)
  return tmp_path


def test_a_corpus_has_each_text_once_in_an_order_of_its_own(files) -> None:
  documents = text_corpus.gather(True, 1 << 20)
  keys = [x.sha256 for x in documents]
  assert len(keys) == 20 and keys == sorted(set(keys))
  size = documents[0].bytes
  assert text_corpus.gather(True, 5 * size + 40) == documents[:5]
  found = text_corpus.describe(documents)
  assert (found["files"], found["packages"]) == (20, 2)
  assert found["bytes"] == sum(x.bytes for x in documents)


def test_held_out_documents_are_in_no_shard(files, tmp_path) -> None:
  documents = text_corpus.gather(True, 1 << 20)
  text_corpus.write(documents, tmp_path / "out", 3)
  texts = {
    part: [
      json.loads(line)["text"]
      for path in sorted((tmp_path / "out" / part).iterdir())
      for line in path.read_text().splitlines()
    ]
    for part in ("train", "held-out")
  }
  assert texts["held-out"] == [x.text for x in documents[:8]]
  assert sorted(texts["train"]) == sorted(x.text for x in documents[8:])


@pytest.mark.parametrize("settings", [text_run.PAPER, text_run.TINY])
def test_systems_share_all_but_the_model(settings, tmp_path) -> None:
  runs = {}
  for name, preset in text_run.PRESETS.items():
    options = text_run.train_options(name, settings, tmp_path)
    del options["run-dir"]
    words = [x for k, v in options.items() for x in (f"--{k}", str(v))]
    default = TrainArgs(make_presets()[preset])
    runs[name] = tyro.cli(TrainArgs, args=words, default=default).run
  models = [x.model for x in runs.values()]
  assert (
    len({dataclasses.replace(x, model=models[0]) for x in runs.values()}) == 1
  )
  assert runs["rebased"].steps == settings.steps
  assert len({(x.width, x.vocab_size, x.positions) for x in models}) == 1


def test_a_result_of_other_settings_is_refused(tmp_path) -> None:
  result = {
    "settings": {"tokens": 1},
    "device": "cpu",
    "corpus": {"sha256": "a", "tokenizer_sha256": "b"},
  }
  text_run.check_same(result, result, tmp_path)
  other = result | {"settings": {"tokens": 2}}
  with pytest.raises(SystemExit, match="tokens: 1 → 2; choose another --out"):
    text_run.check_same(result, other, tmp_path)


_SAVES = "import signal; signal.signal(15, lambda *_: exit(143))"


@pytest.mark.parametrize(
  "script, outcome",
  [
    ("import time; time.sleep(60)", None),  # not under way
    (f"import time; {_SAVES}; time.sleep(60)", None),
    (f"import time; {_SAVES.replace('143', '1')}; time.sleep(60)", "code 1"),
    ("exit(2)", "code 2"),
    ("", True),
  ],
)
def test_a_system_that_has_no_more_time(
  script, outcome, tmp_path, monkeypatch
) -> None:
  monkeypatch.setattr(
    text_run, "rebased", lambda *words: [sys.executable, "-c", script]
  )
  run = lambda seconds: text_run.train(
    "based", text_run.TINY, tmp_path, time.monotonic() + seconds
  )
  if isinstance(outcome, str):
    with pytest.raises(SystemExit, match=outcome):
      run(3)
  else:
    assert (run(3) is not None) is bool(outcome)
  assert run(0) is None


@pytest.mark.slow
def test_end_to_end(tmp_path) -> None:
  def run(*words: str, tokens: int = 10_240) -> subprocess.CompletedProcess:
    command = [sys.executable, "benchmarks/text/run.py", "--model", "tiny"]
    command += ["--work", str(tmp_path / "work"), "--tokens", str(tokens)]
    command += ["--out", str(tmp_path / "text.json"), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

  done = run("--systems", "rebased", "--seconds", "1")
  assert done.returncode == 0 and "out of time" in done.stdout, done.stderr
  assert not (tmp_path / "text.json").exists()
  done = run()
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / "text.json").read_text())
  assert list(found["systems"]) == ["attention", "based", "rebased"]
  for system in found["systems"].values():
    assert system["tokens"] == 10_240
    losses = [row[1] for row in system["held_out"]["rows"]]
    assert losses[-1] < losses[0]
    assert system["train"]["rows"][-1][0] == 10_240
  assert (tmp_path / "text.png").stat().st_size > 10_000
  before = (tmp_path / "text.json").read_bytes()
  assert run().returncode == 0  # nothing is left to do
  assert (tmp_path / "text.json").read_bytes() == before
  assert "is of another run" in run(tokens=20_480).stderr
