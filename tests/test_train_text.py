"""Training on text: the same commands, from files to perplexity."""

import dataclasses
import json
import math
from pathlib import Path
import re
import shutil
import string
import textwrap

from data_cases import EOS, write_megatron, write_prepared
from flax import nnx
import jax
import numpy as np
import pytest
from train_cases import (
  bits,
  command,
  files,
  finish,
  run,
  saved_bits,
  tiny,
  trainer as trainer,
)

from rebased_jax import LM
from train import cli
from train.config import RunConfig, TextData, from_json, to_json
from train.run_folder import RunFolder, RunFolderError

# Real text: the sources of two modules, a document a paragraph.
_TEXT = "".join(Path(x.__file__).read_text() for x in (textwrap, string))
_DOCUMENTS = [
  np.append(np.frombuffer(x.encode(), np.uint8).astype(int), EOS)
  for x in _TEXT.split("\n\n")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
  half = len(_DOCUMENTS) // 2
  path = tmp_path_factory.mktemp("text") / "set"
  return write_prepared(
    path, (_DOCUMENTS[:half], _DOCUMENTS[half:]), domains=("code", "prose")
  )


def _config(path: Path, *, data=None, model=None, **changes) -> RunConfig:
  base = tiny(model=dict(vocab_size=257, **(model or {})))
  text = TextData(
    **{
      **dict(path=(str(path),), length=16, validation=0.2, eval_rows=20),
      **dict(cache_dir=str(path.parent / "plans")),
      **(data or {}),
    }
  )
  return dataclasses.replace(base, data=text, **changes)


def _options(config: RunConfig) -> list[str]:
  """The options that make a config of `_config` out of lm-tiny."""
  data, model = config.data, config.model
  values = {
    "data.path": " ".join(data.path),
    "data.length": data.length,
    "data.validation": data.validation,
    "data.eval-rows": data.eval_rows,
    "data.cache-dir": data.cache_dir,
    "model.width": model.width,
    "model.pairs": 1,
    "model.mlp-width": None,
    "model.mixer.heads": 2,
    "optimizer.warmup-steps": 2,
  }
  for name in ("steps", "batch", "eval-every", "save-every", "log-every"):
    values[name] = getattr(config, name.replace("-", "_"))
  return [word for k, v in values.items() for word in (f"--{k}", str(v))]


@pytest.fixture
def call(capsys, monkeypatch, tmp_path: Path):
  """Runs a command in an empty folder: (code, stdout, stderr)."""
  monkeypatch.setenv("COLUMNS", "200")
  (tmp_path / "cwd").mkdir()
  monkeypatch.chdir(tmp_path / "cwd")

  def call(*args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
      cli.main(args)
    out, err = capsys.readouterr()
    return exit.value.code, out, err

  return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory, trainer, folder: Path) -> Path:
  path = tmp_path_factory.mktemp("text-runs") / "run"
  run(_config(folder), path)
  return path


def test_perplexity_is_recorded(finished: Path) -> None:
  records = RunFolder(finished).read_metrics()
  assert {x["kind"] for x in records} == {"train", "eval"}
  for record in records:
    assert math.isclose(record["perplexity"], math.exp(record["loss"]))
  held_out = [x for x in records if x["kind"] == "eval"]
  assert all(x["tokens"] == 20 * 16 for x in held_out)
  assert held_out[-1]["loss"] < held_out[0]["loss"] < math.log(257) + 0.5


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_ends_the_same(finished, folder, tmp_path, step) -> None:
  config = _config(folder)
  path = tmp_path / "run"
  shutil.copytree(finished, path)
  for later in range(step + 1, 7):
    shutil.rmtree(path / "checkpoints" / str(later), ignore_errors=True)
  _, text = run(config, path)
  assert f"resuming at step {step}" in text
  assert saved_bits(path, config) == saved_bits(finished, config)
  losses = [
    [(x["kind"], x["step"], x["loss"]) for x in RunFolder(p).read_metrics()]
    for p in (path, finished)
  ]
  assert losses[0] == losses[1]


@pytest.mark.parametrize("packing", ["documents", "rows"])
def test_other_packings_train(tmp_path: Path, packing: str) -> None:
  if packing == "rows":
    raw = np.frombuffer(_TEXT.encode(), np.uint8)
    rows = list(raw[: len(raw) // 17 * 17].reshape(-1, 17))
    path = write_megatron(tmp_path / "rows", rows, cuts=(1001,))
  else:
    path = write_prepared(tmp_path / "set", (_DOCUMENTS,))
  config = _config(path, data=dict(packing=packing), steps=4, eval_every=4)
  outcome, _ = run(config, tmp_path / "run")
  assert outcome.reason == "finished"
  assert 0 < outcome.held_out["perplexity"] < 500
  if packing == "documents":
    assert outcome.held_out["tokens"] < 20 * 16  # borders count for nothing


def test_documents_do_not_see_each_other(folder: Path) -> None:
  """The packed batch's segments reach the model: losses are per document."""
  config = _config(
    folder,
    data=dict(packing="documents", length=200),
    model=dict(positions=None),
  )
  model = LM(config.model, rngs=nnx.Rngs(0))
  batch = config.data.train_batches(64, 0).read(0)
  row = int(np.argmax(batch["segment_ids"].max(axis=1)))
  tokens, segments = batch["tokens"][row : row + 1], batch["segment_ids"][row]
  second = segments == 2
  assert second.sum() > 1
  packed = model(tokens, segment_ids=segments[None])[0, second]
  alone = model(tokens[:, second])[0]
  # float32, two layers: sums over 16 numbers in another order.
  np.testing.assert_allclose(packed, alone, atol=1e-5)


def _changed_copy(folder: Path, target: Path) -> Path:
  shutil.copytree(folder, target)
  return target


def test_changed_files_refuse_to_resume(call, tmp_path, folder) -> None:
  data = _changed_copy(folder, tmp_path / "set")
  config = _config(data, steps=4, save_every=2, eval_every=4)
  path = tmp_path / "run"
  run(config, path)
  shutil.rmtree(path / "checkpoints" / "4")
  shard = data / "shard-00001.arrayrecord"
  sound = shard.read_bytes()
  before = files(path)
  half = len(_DOCUMENTS) // 2
  other = [np.where(x == ord("d"), ord("b"), x) for x in _DOCUMENTS[half:]]
  write_prepared(tmp_path / "other", (other,))
  shutil.copy(tmp_path / "other" / "shard-00000.arrayrecord", shard)
  code, _, err = call("resume", str(path))
  assert code == 2 and "the data has changed: blocks was" in err
  assert "--allow-data-change" in err and files(path) == before
  shard.write_bytes(sound)
  sidecar = data / "dataset.json"
  content = json.loads(sidecar.read_text())
  content["tokenizer"]["sha256"] = "another"
  sidecar.write_text(json.dumps(content))
  code, _, err = call("resume", str(path))
  assert code == 2 and "tokenizer was" in err and "is 'another'" in err
  code, out, _ = call("resume", str(path), "--allow-data-change")
  assert code == 0 and "tokenizer was" in out and "resuming at step 2" in out
  code, _, err = call("resume", str(path))  # the new data is the run's now
  assert code == 0, err


def test_changed_fields_refuse_to_resume(call, tmp_path, folder) -> None:
  config = _config(folder, steps=4, save_every=2, eval_every=4)
  path = tmp_path / "run"
  run(config, path)
  shutil.rmtree(path / "checkpoints" / "4")
  for changes, named in (
    (dict(batch=16), "batch: 8 → 16"),
    (dict(seed=1), "seed: 0 → 1"),
    (dict(data=dict(length=15)), "data.length: 16 → 15"),
  ):
    other = _config(folder, **{**dict(steps=4, eval_every=4), **changes})
    with pytest.raises(RunFolderError, match=named) as caught:
      run(other, path)
    assert "--allow-data-change" in str(caught.value)
  wider = _config(folder, model=dict(width=32), steps=4, eval_every=4)
  with pytest.raises(RunFolderError, match="model.width: 16 → 32") as caught:
    run(wider, path)
  assert "--allow-data-change" not in str(caught.value)


def test_a_changed_batch_goes_on_where_it_is_allowed(
  call, tmp_path, folder
) -> None:
  config = _config(folder, steps=4, save_every=2, eval_every=4)
  path = tmp_path / "run"
  words = ("train", "lm-tiny", "--run-dir", str(path))
  code, _, err = call(*words, *_options(config))
  assert code == 0, err
  shutil.rmtree(path / "checkpoints" / "4")
  other = _options(dataclasses.replace(config, batch=16))
  code, out, err = call(*words, *other, "--allow-data-change")
  assert code == 0, err
  assert "batch: 8 → 16" in out and "resuming at step 2" in out
  assert RunFolder(path).read_config().batch == 16
  assert [x.name for x in path.glob("*.tmp")] == []
  code, out, _ = call("evaluate", str(path))
  assert code == 0
  last = [x for x in RunFolder(path).read_metrics() if x["kind"] == "eval"][-1]
  shown = dict(re.findall(r"│ ([\w -]+?) +│ +([\d.,]+) │", out))
  assert shown["held-out perplexity"] == f"{last['perplexity']:.4f}"
  assert shown["targets"] == "320"
  code, _, err = call("evaluate", str(path), "--test")
  assert code == 2 and "data.test=0.0" in err


def test_workers_train_the_same(tmp_path, folder, finished, trainer) -> None:
  config = _config(folder, data=dict(workers=2), steps=6)
  path = tmp_path / "run"
  RunFolder(path).open(config)
  code, out, err = finish(
    command("resume", str(path), cache=trainer, devices=8)
  )
  assert code == 0, err
  assert saved_bits(path, config) == saved_bits(finished, config)


def test_refusals_leave_nothing(call, folder: Path) -> None:
  config = _config(folder)
  words = ("train", "lm-tiny", *_options(config))
  for options, expected in (
    (["--data.path"], "data.path=()"),
    (["--data.path", "nowhere"], "nowhere: expected a prepared folder"),
    (["--data.length", "9999999"], "no validation row|no train row"),
    (["--data.length", "0"], "length=0"),
    (["--data.validation", "0"], "data.validation=0.0"),
    (["--data.weights", "1", "2"], "weights=(1.0, 2.0)"),
    (["--data.workers", "-1"], "data.workers=-1"),
    (["--model.vocab-size", "256"], "at least 257, the vocabulary"),
    (["--data.packing", "rows"], "length + 1 = 17 with packing='rows'"),
  ):
    code, out, err = call(*words, *options)
    text = re.sub(r"\s*│?\n│?\s*", " ", out + err)
    assert code == 2 and any(x in text for x in expected.split("|")), text
    assert "Traceback" not in err
    assert list(Path.cwd().iterdir()) == []


def test_a_test_split_and_own_held_out_text(tmp_path, folder: Path) -> None:
  config = _config(folder, data=dict(test=0.2))
  held_out = [
    make(4, 0).parts[0].plan.document_n
    for make in (
      config.data.train_batches,
      config.data.eval_batches,
      config.data.test_batches,
    )
  ]
  joined = np.concatenate(held_out)
  assert len(set(joined.tolist())) == len(joined) == len(_DOCUMENTS)
  other = write_prepared(tmp_path / "other", (_DOCUMENTS[:9],))
  own = _config(folder, data=dict(validation=0.0, eval_path=(str(other),)))
  assert len(own.data.eval_batches(4, 0).parts[0].source) == 9
  assert len(own.data.train_batches(4, 0).parts[0].plan.document_n) == len(
    _DOCUMENTS
  )


def test_the_config_is_read_as_it_was_written(folder: Path) -> None:
  config = _config(folder, data=dict(weights=(2.0,)))
  assert from_json(to_json(config)) == config


def test_inspect_data(call, folder: Path, tmp_path: Path) -> None:
  before = files(folder)
  code, out, err = call("inspect", "data", str(folder), "--verify")
  assert code == 0, err
  total = sum(len(x) for x in _DOCUMENTS)
  for name, value in (
    ("documents", f"{len(_DOCUMENTS):,}"),
    ("tokens", f"{total:,}"),
    ("vocabulary", "257"),
    ("tokenizer", "bytes"),
  ):
    assert re.search(rf"│ {name} +│ +{value} │", out), name
  for domain in ("code", "prose"):
    assert re.search(rf"│ {domain} +│ +\d+ │ +[\d,]+ │ +[\d.]+% │", out)
  assert "all 2 shards have their checksums" in out
  sample = out.rpartition("border between documents\n")[2].strip()
  pieces = [x.strip() for x in sample.split("▌")]
  assert len(pieces) > 1 and all(x in _TEXT for x in pieces)
  assert files(folder) == before
  path = write_megatron(tmp_path / "d", _DOCUMENTS, cuts=(1000,))
  code, out, _ = call("inspect", "data", str(path), "--length", "20")
  assert code == 0 and "tokens are numbers" in out
  assert re.search(r"│ shards +│ +2 │", out)
  code, _, err = call("inspect", "data", str(path), "--verify")
  assert code == 2 and "no checksums" in err
  code, _, err = call("inspect", "data", str(tmp_path))
  assert code == 2 and "no dataset.json" in err


def test_bits_are_compared(finished: Path, folder: Path) -> None:
  """What the tests above compare is not empty."""
  step, found = saved_bits(finished, _config(folder))
  assert step == 6 and len(found) > 20
  assert jax.device_count() == 8 and bits({"a": np.ones(1)})
