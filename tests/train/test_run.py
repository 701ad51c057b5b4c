"""Whole small runs: the files they write, what they learn, how they fail."""

from pathlib import Path

import chex
from flax import nnx
import jax
from matplotlib import image
import numpy as np
import pytest
from train_cases import (
  Spoiled,
  built_once as built_once,
  files,
  flags,
  run,
  tiny,
  trainer as trainer,
)

import train
from train import (
  cli,
  compiled_steps,
  evaluate,
  initial_state,
  metrics,
  trained_model,
)
from train.checkpoint.checkpoints import Checkpoints, read_meta
from train.config import MQARStreamData
from train.devices import mesh as mesh_lib
from train.loop import Outcome
from train.nonfinite_steps import TrainingFailed
from train.records import plots
from train.records.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("built_once")

# With one pair a row, the answer is the row's only value. Attention learns to
# fetch it in some tens of steps. There are 100 held-out rows, in batches of 32.
_CONFIG = tiny(
  model=dict(width=32),
  data=dict(pairs=1, length=8, vocab_size=16, test_examples=100),
  optimizer=dict(learning_rate=3e-2, warmup_steps=5),
  steps=300,
  batch=32,
  eval_every=10,
  save_every=5,
  log_every=5,
  stop_accuracy=0.9,
  tensorboard=True,
)


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> Path:
  """Return the folder of `_CONFIG`, trained by the command."""
  folder = tmp_path_factory.mktemp("run") / "learned"
  args = ["train", "mqar", *flags(_CONFIG), "--run-dir", str(folder)]
  args.remove("True")  # tensorboard is a flag
  with pytest.raises(SystemExit) as exit:
    cli.main(args)
  assert exit.value.code == 0
  return folder


def test_it_learns_and_stops_early(learned: Path) -> None:
  held_out = [
    (x["step"], x["accuracy"])
    for x in RunFolder(learned).read_metrics()
    if x["kind"] == "eval"
  ]
  *before, (last, accuracy) = held_out
  assert accuracy > 0.9 >= max((x for _, x in before), default=0)
  assert 10 <= last < 300 and held_out[0][1] < 0.5
  step, meta = read_meta(learned / "checkpoints")
  assert (step, meta["finished"]) == (last, "accuracy")
  assert meta["held_out"]["accuracy"] == accuracy


def test_the_files_of_a_run(learned: Path) -> None:
  assert {x.name for x in learned.iterdir()} == {
    *("config.json", "metrics.jsonl", "checkpoints", "tensorboard"),
    *("learning.png", "attention.png", "sharding.txt", "last_save.json"),
  }
  assert RunFolder(learned).read_config() == _CONFIG
  assert len(list((learned / "checkpoints").iterdir())) <= _CONFIG.keep
  boards = list((learned / "tensorboard").glob("events.out.tfevents.*"))
  assert len(boards) == 1
  content = boards[0].read_bytes()
  for name in (b"train/loss", b"train/step_seconds", b"eval/accuracy"):
    assert name in content


def _listed_metrics(kind: str) -> set[str]:
  """Return the names that METRICS lists for records without text."""
  names = set()
  for metric in metrics.METRICS:
    if isinstance(metric, metrics.TargetMetric):
      listed = not metric.needs_recall
    elif isinstance(metric, metrics.DerivedMetric):
      listed = not metric.text_only
    else:  # the numbers of "affine" have the names of layers
      listed = kind == "train" and metric.name != "affine"
    if listed:
      names.add(metric.name)
  return names


def test_the_records_of_a_run(learned: Path) -> None:
  records = RunFolder(learned).read_metrics()
  fields = {
    "eval": {"loss", "accuracy", "tokens"},
    "train": {
      *("loss", "accuracy", "grad_norm", "param_norm", "update_norm"),
      *("tokens_per_second", "step_seconds", "data_wait_fraction", "goodput"),
      *("learning_rate", "tokens_seen", "unix_time"),
      *(
        f"layer1/{side}_{name}_{kind}"
        for side in ("query", "key")
        for name in ("gamma", "beta")
        for kind in ("mean", "std")
      ),
    },
  }
  for record in records:
    kind, names = record["kind"], record.keys() - {"kind", "step"}
    assert fields[kind] <= names <= fields[kind] | _listed_metrics(kind)
    for name in names:
      assert np.isfinite(record[name]), name
    for name in fields[kind]:
      assert record[name] >= 0 or name.endswith("beta_mean"), name
    if record["kind"] == "eval":
      assert record["tokens"] == 100  # padding rows do not count
    else:
      rate = record["tokens_per_second"] * record["step_seconds"]
      np.testing.assert_allclose(rate, 32 * 8)
      assert record["tokens_seen"] == record["step"] * 32 * 8
      assert record["data_wait_fraction"] <= 1 >= record["accuracy"]
  steps = [x["step"] for x in records if x["kind"] == "train"]
  assert steps == [*range(5, steps[-1] + 1, 5)]


@pytest.mark.parametrize("name", ["learning.png", "attention.png"])
def test_pictures_are_not_blank(learned: Path, name: str) -> None:
  assert (learned / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
  pixels = image.imread(learned / name)[..., :3]
  assert min(pixels.shape[:2]) > 400
  colours = np.unique(np.round(pixels, 1).reshape(-1, 3), axis=0)
  assert len(colours) > 20
  if name == "learning.png":  # both lines, in matplotlib's blue and orange
    for colour in ((0.122, 0.467, 0.706), (1.0, 0.498, 0.055)):
      near = np.abs(pixels - np.float32(colour)).max(-1) < 0.01
      assert near.sum() > 100


def test_a_loaded_model_has_the_recorded_loss(learned: Path) -> None:
  record = RunFolder(learned).read_metrics()[-1]
  model = train.load(str(learned))
  logits = nnx.jit(lambda model, tokens: model(tokens))
  data = _CONFIG.data.eval_batches(32, _CONFIG.seed)
  right = nll = tokens = 0.0
  for index in range(data.num_batches):
    batch = data.read(index)
    logits_BTV = np.float64(logits(model, batch["tokens"]))
    for b in range(32):
      if 32 * index + b >= 100:
        continue  # padding
      z_V = logits_BTV[b, batch["positions"][b, 0]]
      target = batch["targets"][b, 0]
      right += z_V.argmax() == target
      nll += np.log(np.exp(z_V - z_V[target]).sum())
      tokens += 1
  assert (tokens, right / tokens) == (100, record["accuracy"])
  np.testing.assert_allclose(nll / tokens, record["loss"], rtol=1e-4)
  first = min(int(x.name) for x in (learned / "checkpoints").iterdir())
  older = trained_model.load_params(str(learned), first)[2]["norm"]["scale"]
  assert not np.array_equal(older, model.norm.scale[...])


def test_true_columns_are_those_of_the_answers() -> None:
  batch = MQARStreamData(vocab_size=64, length=32, pairs=4).eval_batches(4, 0)
  batch = batch.read(0)
  for row in range(4):
    tokens_T, positions_N = batch["tokens"][row], batch["positions"][row]
    columns_N = plots.true_columns(tokens_T, positions_N)
    assert np.array_equal(tokens_T[columns_N], batch["targets"][row])
    assert np.array_equal(tokens_T[columns_N - 1], tokens_T[positions_N])


def test_data_is_tried_with_the_batch_of_the_run(monkeypatch) -> None:
  asked = {}
  for kind in ("train_batches", "eval_batches"):
    make = getattr(MQARStreamData, kind)

    def note(data, rows, seed, kind=kind, make=make):
      asked[kind] = rows
      return make(data, rows, seed)

    monkeypatch.setattr(MQARStreamData, kind, note)
  initial_state.try_data(tiny(accumulate=4))
  assert asked == dict(train_batches=8, eval_batches=2)


def test_held_out_batches_without_an_end_are_refused(
  tmp_path: Path, monkeypatch
) -> None:
  """And the folder of the run is not made."""
  endless = MQARStreamData.train_batches
  monkeypatch.setattr(MQARStreamData, "eval_batches", endless)
  message = (
    "MQARStreamData.eval_batches: num_batches is None: expected a number"
  )
  with pytest.raises(ValueError, match=message):
    train.run(tiny(), tmp_path / "run")
  assert list(tmp_path.iterdir()) == []
  config, mesh = tiny(), mesh_lib.make_mesh()
  with jax.set_mesh(mesh):
    built = compiled_steps.build(config, mesh)
    data = config.data.train_batches(config.batch, 0)
    with pytest.raises(ValueError, match="MQARStream.num_batches is None"):
      evaluate.evaluate(built, None, data)


def test_an_outcome_prints_without_its_arrays() -> None:
  outcome = Outcome(2, "finished", 0, {"loss": 1.5}, 3.0, {"w": np.ones(9)})
  assert repr(outcome) == (
    "Outcome(step=2, reason='finished', exit_code=0, "
    "held_out={'loss': 1.5}, seconds=3.0)"
  )


def _spoil(monkeypatch, bad_step: int) -> None:
  make = MQARStreamData.train_batches
  monkeypatch.setattr(
    MQARStreamData,
    "train_batches",
    lambda *args: Spoiled(make(*args), bad_step),
  )


def test_a_step_that_is_not_finite_ends_the_run(
  tmp_path: Path, monkeypatch, capsys
) -> None:
  config, folder = tiny(), tmp_path / "run"
  with monkeypatch.context() as patch:
    _spoil(patch, 4)
    with pytest.raises(SystemExit) as exit:
      cli.main(["train", "mqar", *flags(config), "--run-dir", str(folder)])
  assert exit.value.code == 1
  kept = folder / "failed-step-4"
  err = capsys.readouterr().err
  assert "rebased: step 4 is not finite: " in err and str(kept) in err
  assert "Traceback" not in err
  reason = (kept / "reason.txt").read_text()
  assert reason.startswith("step 4 is not finite: ") and "loss=nan" in reason
  with np.load(kept / "batch.npz") as batch:
    assert np.isnan(batch["weights"][0, 0])
    expected = config.data.train_batches(8, 0).read(4)
    assert np.array_equal(batch["tokens"], expected["tokens"])
  assert _checkpoint_steps(folder) == {2, 4}
  train_steps = [x["step"] for x in RunFolder(folder).read_metrics()]
  assert max(train_steps) == 4

  dumped, found = _restored(kept, config), _restored(folder, config)
  assert int(dumped["step"]) == int(found["step"]) == 4
  assert not bool(dumped["ok"]) and bool(found["ok"])
  for name in ("params", "opt_state"):
    chex.assert_trees_all_equal(dumped[name], found[name])
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(dumped["params"]))
  outcome, out = run(config, folder)  # without the spoiled batch
  assert outcome.step == 6 and "resuming at step 4" in out


def test_failing_again_leaves_the_run_as_it_was(
  tmp_path: Path, monkeypatch
) -> None:
  config, folder = tiny(), tmp_path / "run"
  _spoil(monkeypatch, 3)
  with pytest.raises(TrainingFailed, match="step 3 is not finite"):
    run(config, folder)
  before = files(folder / "checkpoints" / "2")
  with pytest.raises(TrainingFailed, match="step 3 is not finite"):
    run(config, folder)
  assert files(folder / "checkpoints" / "2") == before
  assert _checkpoint_steps(folder) == {2}
  assert _checkpoint_steps(folder / "failed-step-3") == {3}


def _checkpoint_steps(folder: Path) -> set[int]:
  return {int(x.name) for x in (folder / "checkpoints").iterdir()}


def _restored(folder: Path, config) -> dict:
  mesh = mesh_lib.make_mesh()
  with jax.set_mesh(mesh):
    abstract = compiled_steps.to_dicts(
      compiled_steps.build(config, mesh).abstract
    )
    with Checkpoints(folder / "checkpoints") as checkpoints:
      return jax.device_get(checkpoints.restore(abstract).state)


def test_a_full_disk_ends_the_run(tmp_path: Path, monkeypatch, capsys) -> None:
  from train.checkpoint import orbax_storage as storage

  class Response:
    def result(self):
      raise OSError(28, "No space left on device")

  start = storage.Writer.start

  def full(self, step, state, record):
    if step < 4:
      start(self, step, state, record)
    else:
      self._pending = step, Response()

  monkeypatch.setattr(storage.Writer, "start", full)
  folder = tmp_path / "run"
  with pytest.raises(SystemExit) as exit:
    cli.main(["train", "mqar", *flags(tiny()), "--run-dir", str(folder)])
  assert exit.value.code == 1
  err = capsys.readouterr().err
  assert "checkpoint step 4 was not saved: OSError" in err
  assert "No space left on device" in err and "Traceback" not in err
  assert _checkpoint_steps(folder) == {2}


def test_the_default_folder_is_relative(tmp_path: Path, monkeypatch) -> None:
  """`runs/PRESET-TIME`, as the README's command has it."""
  monkeypatch.chdir(tmp_path)
  words = ["train", "mqar", *flags(tiny(steps=4, eval_every=4, save_every=2))]
  with pytest.raises(SystemExit) as end:
    cli.main(words)
  assert end.value.code == 0
  (folder,) = (tmp_path / "runs").iterdir()
  assert folder.name.startswith("mqar-")
  assert train.load(str(folder.relative_to(tmp_path))).config.width > 0
