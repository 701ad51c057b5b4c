"""Training on text, from files to perplexity."""

import dataclasses
import json
import math
from pathlib import Path
import re
import shutil

from data_cases import write_megatron, write_prepared
from flax import nnx
import numpy as np
import pytest
from text_cases import (
  DOCUMENTS,
  TEXT,
  finished as finished,
  folder as folder,
  make_config,
  make_options,
)
from train_cases import (
  built_once as built_once,
  call as call,
  command,
  files,
  finish,
  run,
  saved_bits,
  trainer as trainer,
)

from rebased_jax import LM
from train.data.text.megatron_source import MegatronSource
from train.data.text.packing import split_documents
from train.data.text.token_source import DataError
from train.nonfinite_steps import TrainingFailed
from train.records.run_folder import RunFolder, RunFolderError

pytestmark = pytest.mark.usefixtures("built_once")


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
  config = make_config(folder)
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
    raw = np.frombuffer(TEXT.encode(), np.uint8)
    rows = list(raw[: len(raw) // 17 * 17].reshape(-1, 17))
    path = write_megatron(tmp_path / "rows", rows, cuts=(1001,))
  else:
    path = write_prepared(tmp_path / "set", (DOCUMENTS,))
  config = make_config(path, data=dict(packing=packing), steps=4, eval_every=4)
  outcome, _ = run(config, tmp_path / "run")
  assert outcome.reason == "finished"
  assert 0 < outcome.held_out["perplexity"] < 500
  if packing == "documents":
    assert (
      outcome.held_out["tokens"] < 20 * 16
    )  # document boundaries have no target


def test_documents_do_not_see_each_other(folder: Path) -> None:
  """The segment ids of a packed batch reach the model."""
  config = make_config(
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
  # float32, two layers: sums over 16 numbers in another order round apart.
  np.testing.assert_allclose(packed, alone, atol=1e-5)


def _changed_copy(folder: Path, target: Path) -> Path:
  shutil.copytree(folder, target)
  return target


def test_changed_files_refuse_to_resume(call, tmp_path, folder) -> None:
  data = _changed_copy(folder, tmp_path / "set")
  config = make_config(data, steps=4, save_every=2, eval_every=4)
  path = tmp_path / "run"
  run(config, path)
  shutil.rmtree(path / "checkpoints" / "4")
  shard = data / "shard-00001.arrayrecord"
  sound = shard.read_bytes()
  before = files(path)
  half = len(DOCUMENTS) // 2
  other = [np.where(x == ord("d"), ord("b"), x) for x in DOCUMENTS[half:]]
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
  code, _, err = call("resume", str(path))  # the run has the new data now
  assert code == 0, err


def test_changed_fields_refuse_to_resume(call, tmp_path, folder) -> None:
  config = make_config(folder, steps=4, save_every=2, eval_every=4)
  path = tmp_path / "run"
  run(config, path)
  shutil.rmtree(path / "checkpoints" / "4")
  for changes, named in (
    (dict(batch=16), "batch: 8 → 16"),
    (dict(seed=1), "seed: 0 → 1"),
    (dict(data=dict(length=15)), "data.length: 16 → 15"),
  ):
    other = make_config(folder, **{**dict(steps=4, eval_every=4), **changes})
    with pytest.raises(RunFolderError, match=named) as caught:
      run(other, path)
    assert "--allow-data-change" in str(caught.value)
  wider = make_config(folder, model=dict(width=32), steps=4, eval_every=4)
  with pytest.raises(RunFolderError, match="model.width: 16 → 32") as caught:
    run(wider, path)
  assert "--allow-data-change" not in str(caught.value)


def test_a_changed_batch_resumes_where_it_is_allowed(
  call, tmp_path, folder
) -> None:
  config = make_config(folder, steps=4, save_every=2, eval_every=4)
  path = tmp_path / "run"
  words = ("train", "lm-tiny", "--run-dir", str(path))
  code, _, err = call(*words, *make_options(config))
  assert code == 0, err
  shutil.rmtree(path / "checkpoints" / "4")
  other = make_options(dataclasses.replace(config, batch=16))
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
  config = make_config(folder, data=dict(workers=2), steps=6)
  path = tmp_path / "run"
  RunFolder(path).open(config)
  code, out, err = finish(
    command("resume", str(path), cache=trainer, devices=8)
  )
  assert code == 0, err
  assert saved_bits(path, config) == saved_bits(finished, config)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_token_past_the_vocabulary_is_named(
  tmp_path: Path, monkeypatch, split: str
) -> None:
  """Even a run that skips steps ends, before the step or before the run."""
  texts = [text.copy() for text in DOCUMENTS]
  chosen = split_documents(len(texts), split, 0.2, 0.0)
  ends = np.cumsum([len(texts[i]) for i in chosen])
  # Rows of 16 tokens, 8 a step: the fourth step, or some held-out row.
  place = 3 * 128 + 5 if split == "train" else 100
  index = int(np.searchsorted(ends, place, side="right"))
  document, token = int(chosen[index]), place - int(ends[index])
  texts[document][token] = 300
  path = write_megatron(tmp_path / "d", texts, cuts=(1001,))
  config = make_config(
    path, data=dict(shuffle=False, eval_rows=None), nan="skip", eval_every=3
  )
  named = f"{path}: document {document}, token {len(texts[document]) + token}"
  named += " .* 300: expected 0 to 256"
  with pytest.raises(DataError, match=named):
    run(config, tmp_path / "refused")
  assert not (tmp_path / "refused").exists()
  # Not found in the sample of a large data set.
  monkeypatch.setattr(MegatronSource, "check_tokens", lambda *args: None)
  with pytest.raises(TrainingFailed, match=named):
    run(config, tmp_path / "run")
  steps = {int(x.name) for x in (tmp_path / "run" / "checkpoints").iterdir()}
  assert steps and steps <= {2, 3}  # what was learnt before is kept
