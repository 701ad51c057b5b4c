"""Test the verbs on text: errors, splits, and `inspect data`."""

import json
from pathlib import Path
import re
import shutil

from data_cases import write_megatron, write_prepared
import jax
import numpy as np
from text_cases import (
  DOCUMENTS,
  TEXT,
  finished as finished,
  folder as folder,
  make_config,
  make_options,
)
from train_cases import (
  bits,
  call as call,
  files,
  saved_bits,
  trainer as trainer,
)

from train.stored_config import from_json, to_json


def test_errors_leave_no_folder(call, folder: Path) -> None:
  config = make_config(folder)
  words = ("train", "lm-tiny", *make_options(config))
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


def test_a_test_split_and_a_separate_held_out_text(
  tmp_path, folder: Path
) -> None:
  config = make_config(folder, data=dict(test=0.2))
  held_out = [
    make(4, 0).parts[0].plan.document_n
    for make in (
      config.data.train_batches,
      config.data.eval_batches,
      config.data.test_batches,
    )
  ]
  joined = np.concatenate(held_out)
  assert len(set(joined.tolist())) == len(joined) == len(DOCUMENTS)
  other = write_prepared(tmp_path / "other", (DOCUMENTS[:9],))
  own = make_config(folder, data=dict(validation=0.0, eval_path=(str(other),)))
  assert len(own.data.eval_batches(4, 0).parts[0].source) == 9
  assert len(own.data.train_batches(4, 0).parts[0].plan.document_n) == len(
    DOCUMENTS
  )


def test_a_text_config_survives_json(folder: Path) -> None:
  config = make_config(folder, data=dict(weights=(2.0,)))
  assert from_json(to_json(config)) == config


def test_inspect_data_shows_counts_and_a_sample(
  call, folder: Path, tmp_path: Path
) -> None:
  before = files(folder)
  code, out, err = call("inspect", "data", str(folder), "--verify")
  assert code == 0, err
  total = sum(len(x) for x in DOCUMENTS)
  for name, value in (
    ("documents", f"{len(DOCUMENTS):,}"),
    ("tokens", f"{total:,}"),
    ("vocabulary", "257"),
    ("tokenizer", "bytes"),
  ):
    assert re.search(rf"│ {name} +│ +{value} │", out), name
  for domain in ("code", "prose"):
    assert re.search(rf"│ {domain} +│ +\d+ │ +[\d,]+ │ +[\d.]+% │", out)
  assert "all 2 shards match their checksums" in out
  sample = out.rpartition("boundary between documents\n")[2].strip()
  pieces = [x.strip() for x in sample.split("▌")]
  assert len(pieces) > 1 and all(x in TEXT for x in pieces)
  assert files(folder) == before
  path = write_megatron(tmp_path / "d", DOCUMENTS, cuts=(1000,))
  code, out, _ = call("inspect", "data", str(path), "--length", "20")
  assert code == 0 and "tokens are numbers" in out
  assert re.search(r"│ shards +│ +2 │", out)
  _, out, _ = call("inspect", "data", str(path), "--length", "2")
  assert "sample: 2 tokens, documents " in out
  one = write_megatron(tmp_path / "one", [DOCUMENTS[0][:1]], cuts=())
  _, out, _ = call("inspect", "data", str(one))
  assert "no sample: the data set has fewer than two tokens" in out
  code, _, err = call("inspect", "data", str(path), "--verify")
  assert code == 2 and "no checksums" in err
  code, _, err = call("inspect", "data", str(tmp_path))
  assert code == 2 and "no dataset.json" in err


def test_the_compared_arrays_are_not_empty(
  finished: Path, folder: Path
) -> None:
  """Guard the tests above against comparing nothing."""
  step, found = saved_bits(finished, make_config(folder))
  assert step == 6 and len(found) > 20
  assert jax.device_count() == 8 and bits({"a": np.ones(1)})


def test_evaluate_refuses_other_data(call, finished: Path, tmp_path) -> None:
  """Tokens of other data have no meaning to the model."""
  folder = tmp_path / "run"
  shutil.copytree(finished, folder)
  config = json.loads((folder / "config.json").read_text())
  (old,) = config["run"]["data"]["path"]

  def evaluate(path: Path, *options: str) -> tuple[int, str, str]:
    config["run"]["data"]["path"] = [str(path)]
    (folder / "config.json").write_text(json.dumps(config))
    return call("evaluate", str(folder), *options)

  code, out, err = evaluate(Path(old))
  assert (code, err) == (0, "") and "warning" not in out
  fewer = write_prepared(tmp_path / "fewer", (DOCUMENTS[:9],))
  code, _, err = evaluate(fewer)
  assert code == 2 and "the data has changed" in err
  assert "--allow-data-change" in err
  code, out, err = evaluate(fewer, "--allow-data-change")
  assert code == 0 and "warning: the data has changed" in out, err
  dataset = fewer / "dataset.json"
  dataset.write_text(dataset.read_text().replace("257", "600"))
  code, _, err = evaluate(fewer, "--allow-data-change")
  assert code == 2 and "at least 600, the vocabulary of the data" in err
