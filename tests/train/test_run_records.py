"""Records for wandb, profiles, MFU and memory; skipped steps; hung data."""

import os
from pathlib import Path
import signal
import struct
import sys
import threading
import time
import types

from etils import epath
import jax
import numpy as np
import pytest
from tensorboardX.proto import event_pb2
from text_cases import folder as folder, make_config, make_options
from train_cases import (
  Spoiled,
  built_once as built_once,
  call as call,
  command,
  finish,
  flags,
  run,
  tiny,
  trainer as trainer,
)

from train import metrics, nonfinite_steps
from train.checkpoint.checkpoints import read_meta
from train.config import MQARStreamData, ProfileConfig
from train.data import prefetch
from train.data.prefetch import DataTimeout, within
from train.devices import batch_sharding, peaks
from train.nonfinite_steps import TrainingFailed
from train.records import device_usage, tensorboard
from train.records.profile import Profile
from train.records.run_folder import RunFolder
from train.stop_signals import StopSignals

pytestmark = pytest.mark.usefixtures("built_once")


class _FakeWandb(types.ModuleType):
  """Stands for the module wandb, and notes what it is called with."""

  def __init__(self):
    super().__init__("wandb")
    self.inits, self.records, self.finished = [], [], 0
    self.exit_codes, self.verified, self.axes = [], [], []

  class Error(Exception):
    """As that of wandb, which is no RuntimeError."""

  def Settings(self, project):
    if "/" in project:
      raise self.Error(f"Invalid project name {project!r}:\nfound '/'")

  def login(self, verify):
    self.verified.append(verify)

  def init(self, **options):
    self.inits.append(options)
    return self

  def define_metric(self, name, step_metric=None):
    self.axes.append((name, step_metric))

  def log(self, values):  # wandb's own step would drop repeated steps
    self.records.append(values)

  def finish(self, exit_code=0):
    self.finished += 1
    self.exit_codes.append(exit_code)


def test_wandb_gets_every_record(tmp_path: Path, monkeypatch) -> None:
  fake = _FakeWandb()
  monkeypatch.setitem(sys.modules, "wandb", fake)
  config, folder = tiny(wandb="recall", steps=4), tmp_path / "run"
  run(config, folder)
  run(config, folder)  # continues the same run at wandb
  first, second = fake.inits
  assert first["project"] == "recall" and first["id"] == second["id"]
  assert first["config"]["model"]["width"] == 16 and fake.finished == 2
  records = RunFolder(folder).read_metrics()
  assert len(fake.records) == len(records) > 4
  assert fake.axes == [("step", None), ("*", "step")] * 2
  for record, values in zip(records, fake.records, strict=True):
    kind, step = record.pop("kind"), record.pop("step")
    named = {f"{kind}/{name}": x for name, x in record.items()}
    assert values == {"step": step, **named}


def test_wandb_learns_how_a_run_ended(tmp_path: Path, monkeypatch) -> None:
  fake = _FakeWandb()
  monkeypatch.setitem(sys.modules, "wandb", fake)
  config = tiny(wandb="recall", steps=4)
  with monkeypatch.context() as patch:
    _spoil(patch, 3)
    with pytest.raises(TrainingFailed):
      run(config, tmp_path / "run")
  with monkeypatch.context() as patch:
    patch.setattr(StopSignals, "signal_number", signal.SIGTERM)
    run(config, tmp_path / "run")
  run(config, tmp_path / "run")
  assert fake.exit_codes == [1, 143, 0]


def _shown_by_tensorboard(folder: Path) -> list[tuple[str, int, float]]:
  """Return (tag, step, value) as TensorBoard shows them, in any order.

  A start of a session hides what earlier files have of its step and later ones.
  """
  shown = []
  files = (folder / "tensorboard").iterdir()
  for path in sorted(files, key=lambda x: x.stat().st_mtime_ns):
    data, begin = path.read_bytes(), 0
    while begin < len(data):  # length, checksum of it, event, its checksum
      (size,) = struct.unpack_from("<Q", data, begin)
      event = event_pb2.Event.FromString(data[begin + 12 : begin + 12 + size])
      begin += 16 + size
      if event.HasField("session_log"):
        shown = [x for x in shown if x[1] < event.step]
      for value in event.summary.value:
        shown.append((value.tag, event.step, value.simple_value))
  return shown


def test_tensorboard_shows_each_step_once_after_a_kill(
  tmp_path: Path, monkeypatch
) -> None:
  """Also the records that were buffered when the run was killed."""
  config, folder = tiny(tensorboard=True, save_every=3), tmp_path / "run"
  before, flushed = Profile.before, set[int]()

  class Killed(BaseException):
    pass

  def die(self, step, state):
    if step == 5:
      flushed.update(step for _, step, _ in _shown_by_tensorboard(folder))
      raise Killed
    before(self, step, state)

  with monkeypatch.context() as patch:
    patch.setattr(Profile, "before", die)
    with pytest.raises(Killed):
      run(config, folder)
  assert flushed >= {1, 2, 3}  # what the checkpoint knows of
  _, out = run(config, folder)
  assert "resuming at step 3" in out
  _check_tensorboard(folder)


def test_tensorboard_shows_an_evaluation_once_that_is_done_again(
  tmp_path: Path, monkeypatch
) -> None:
  """A signal left it to a run that was killed right after it."""
  config, folder = tiny(tensorboard=True, steps=4, eval_every=1), tmp_path / "x"

  class Killed(BaseException):
    pass

  def stop(self, step, state):
    if step == 2:
      patch.setattr(StopSignals, "signal_number", signal.SIGTERM)

  def die(self, step, state):
    raise Killed

  with monkeypatch.context() as patch:
    patch.setattr(Profile, "before", stop)
    run(config, folder)
  with monkeypatch.context() as patch:
    patch.setattr(Profile, "before", die)
    with pytest.raises(Killed):
      run(config, folder)
  assert ("eval/loss", 3) in [x[:2] for x in _shown_by_tensorboard(folder)]
  _, out = run(config, folder)
  assert "resuming at step 3" in out
  _check_tensorboard(folder)


def _check_tensorboard(folder: Path) -> None:
  """Check that TensorBoard shows what metrics.jsonl has."""
  wanted = {
    (f"{x['kind']}/{name}", x["step"]): value
    for x in RunFolder(folder).read_metrics()
    for name, value in x.items()
    if name not in ("kind", "step")
  }
  shown = _shown_by_tensorboard(folder)
  assert sorted(x[:2] for x in shown) == sorted(wanted)
  for tag, step, value in shown:
    np.testing.assert_allclose(value, wanted[tag, step], rtol=1e-6)


def test_every_number_goes_to_tensorboard(tmp_path: Path) -> None:
  board = tensorboard.Board(epath.Path(tmp_path / "tensorboard"), 0)
  numbers = dict(inf=np.inf, nan=np.nan, large=1e300, whole=2**40)
  board.write(3, numbers)
  board.close()
  found = _shown_by_tensorboard(tmp_path)
  assert [x[:2] for x in found] == [(name, 3) for name in numbers]
  assert [x[2] for x in found[2:]] == [np.inf, 2.0**40]


def test_wandb_that_is_not_installed(call, monkeypatch) -> None:
  monkeypatch.setitem(sys.modules, "wandb", None)
  words = ("train", "mqar", *flags(tiny()), "--wandb", "recall")
  code, _, err = call(*words)
  assert code == 2 and "pip install 'rebased-jax[wandb]'" in err
  assert list(Path.cwd().iterdir()) == []


def test_wandb_refuses_before_the_folder_is_made(call, monkeypatch) -> None:
  fake = _FakeWandb()
  monkeypatch.setitem(sys.modules, "wandb", fake)
  words = ("train", "mqar", *flags(tiny()), "--wandb")
  code, _, err = call(*words, "a/b")
  assert code == 2 and "Invalid project name 'a/b': found '/'" in err

  def login(verify):
    raise fake.Error("No API key configured.")

  monkeypatch.setattr(fake, "login", login)
  code, _, err = call(*words, "recall")
  assert code == 2 and "No API key configured: expected a project" in err
  assert "WANDB_MODE=offline" in err and fake.inits == []
  assert list(Path.cwd().iterdir()) == []


def test_a_run_that_wandb_refuses_later_is_named(call, monkeypatch) -> None:
  fake = _FakeWandb()
  monkeypatch.setitem(sys.modules, "wandb", fake)

  def init(**options):
    raise fake.Error("permission denied")

  monkeypatch.setattr(fake, "init", init)
  code, _, err = call("train", "mqar", *flags(tiny()), "--wandb", "recall")
  assert code == 1 and err.startswith("rebased: wandb='recall': permission")
  assert fake.verified == [True] and "Traceback" not in err


def test_a_profile_of_two_steps(tmp_path: Path) -> None:
  config = tiny(profile=ProfileConfig(start=3, steps=2))
  run(config, tmp_path / "run")
  (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
  assert trace.read_bytes().count(b"train_step") >= 2


def test_a_profile_beyond_the_last_step_is_refused() -> None:
  tiny(profile=ProfileConfig(start=4, steps=2))  # steps 4 and 5 of 0 to 5
  with pytest.raises(ValueError, match=r"profile='steps 5 to 6'.* 0 to 5"):
    tiny(profile=ProfileConfig(start=5, steps=2))


def _device(kind: str, cores: int | None = None) -> jax.sharding.AbstractDevice:
  platforms = dict(NVI="gpu", TPU="tpu", cpu="cpu")
  return jax.sharding.AbstractDevice(kind, cores, platforms[kind[:3]])


def test_mfu_is_the_fraction_of_the_peak() -> None:
  h100 = _device("NVIDIA H100 80GB HBM3")
  found = peaks.mfu(430_000, 145_460_736, h100, 1)
  assert abs(found - 0.38) < 0.001  # 430,000 · 6 · 145,460,736 / 989e12
  assert peaks.mfu(1.0, 1, _device("cpu"), 1) is None
  two = peaks.mfu(430_000, 145_460_736, _device("NVIDIA H200"), 2)
  assert two == found / 2


@pytest.mark.parametrize(
  ("kind", "cores", "gib", "tera"),
  [
    # jax's figures. The cores of a TPU7x chip are two devices.
    ("TPU7x", 1, 95.93, 1155),
    ("TPU v6 lite", 1, 32.04, 920),
    ("TPU v5", 2, 95.93, 459),
    ("TPU v5p", 2, 95.93, 459),
    ("TPU v5p", 1, 47.96, 229.5),  # each core its own device
    ("TPU v5 lite", 1, 16.02, 197),
    ("TPU v4", 2, 32.04, 275),
    ("TPU v3", 1, 16.02, 70),
  ],
)
def test_figures_of_a_tpu_are_of_one_device(kind, cores, gib, tera) -> None:
  device = _device(kind, cores)
  assert round(peaks.memory(device) / 2**30, 2) == gib
  assert peaks.flops(device) == tera * 1e12
  assert peaks.mfu(tera * 1e12, 1, device, 6) == 1


def test_figures_of_an_unknown_device_are_none() -> None:
  for device in (_device("TPU v99", 1), _device("cpu"), jax.devices()[0]):
    assert peaks.memory(device) is None and peaks.flops(device) is None
  assert peaks.memory(_device("NVIDIA H200")) is None


def test_device_usage_is_recorded_where_it_is_known(monkeypatch) -> None:
  params = dict(a=np.zeros((3, 5)), b=np.zeros(5))
  assert device_usage.DeviceUsage(params).read(10.0) == {}  # nothing on a CPU
  kind = jax.devices()[0].device_kind
  monkeypatch.setitem(peaks.PEAK_FLOPS, kind, 1e3)
  monkeypatch.setattr(device_usage, "peak_bytes", lambda: 77)
  found = device_usage.DeviceUsage(params).read(10.0)
  assert found == dict(mfu=10 * 6 * 20 / (8 * 1e3), hbm_peak_bytes=77)


def test_the_peak_of_memory_is_the_largest_of_the_devices(monkeypatch) -> None:
  figures = [{"peak_bytes_in_use": 3}, None, {}, {"peak_bytes_in_use": 5}]
  devices = [types.SimpleNamespace(memory_stats=lambda x=x: x) for x in figures]
  monkeypatch.setattr(jax, "local_devices", lambda: devices)
  assert device_usage.peak_bytes() == 5


def test_affine_statistics_by_layer() -> None:
  rng = np.random.default_rng(0)
  blocks = {name: rng.normal(size=(2, 3, 8)) for name in ("first", "second")}
  pairs = {
    name: dict(mixer=dict(query_affine=dict(gamma=gamma_NE, beta=beta_NE)))
    for name, (gamma_NE, beta_NE) in blocks.items()
  }
  found = metrics.by_layer(
    metrics.affine_statistics(metrics.Update(dict(pairs=pairs), None, None))
    | dict(loss=np.float32(2))
  )
  assert found.pop("loss") == 2 and len(found) == 2 * 3 * 4
  for layer in range(6):
    pair, block = layer // 2, ("first", "second")[layer % 2]
    for name, x_NE in zip(("gamma", "beta"), blocks[block], strict=True):
      for kind, wanted in (
        ("mean", x_NE[pair].mean()),
        ("std", x_NE[pair].std()),
      ):
        value = found[f"layer{layer}/query_{name}_{kind}"]
        np.testing.assert_allclose(value, wanted, rtol=1e-5)


def _spoil(monkeypatch, *bad_steps: int) -> None:
  make = MQARStreamData.train_batches

  def spoiled(*args):
    data = make(*args)
    for step in bad_steps:
      data = Spoiled(data, step)
    return data

  monkeypatch.setattr(MQARStreamData, "train_batches", spoiled)


def test_skipped_steps_change_nothing_and_are_counted(
  tmp_path: Path, monkeypatch
) -> None:
  folder = tmp_path / "run"
  with monkeypatch.context() as patch:
    _spoil(patch, 1, 4)
    outcome, out = run(tiny(nan="skip"), folder)
  assert outcome.step == 6 and out.count("is not finite") == 2
  assert int(outcome.state.step) == 6
  (count,) = {
    int(x)
    for path, x in jax.tree_util.tree_leaves_with_path(outcome.state.opt_state)
    if jax.tree_util.keystr(path).endswith("count")
  }
  assert count == 4  # updates
  assert all(
    np.isfinite(x).all() for x in jax.tree.leaves(outcome.state.params)
  )
  records = [
    x for x in RunFolder(folder).read_metrics() if x["kind"] == "train"
  ]
  # A window of one step that was skipped has no means.
  assert [x["step"] for x in records] == [1, 3, 4, 6]
  assert [x["skipped_steps"] for x in records] == [0, 1, 1, 2]
  _, meta = read_meta(folder / "checkpoints")
  assert meta["skipped"] == 2
  for step in (1, 4):
    kept = folder / f"skipped-step-{step}"
    with np.load(kept / "batch.npz") as batch:
      assert np.isnan(batch["weights"][0, 0])
    assert f"step {step} is not finite" in (kept / "reason.txt").read_text()


def _stop_after(monkeypatch, steps: int) -> None:
  before = Profile.before

  def signalled(self, step, state):
    if step == steps - 1:
      os.kill(os.getpid(), signal.SIGTERM)
    before(self, step, state)

  monkeypatch.setattr(Profile, "before", signalled)


def test_a_resumed_run_counts_on(tmp_path: Path, monkeypatch) -> None:
  folder, config = tmp_path / "run", tiny(nan="skip", eval_every=6)
  _spoil(monkeypatch, 1, 2, 4)
  with monkeypatch.context() as patch:
    _stop_after(patch, 3)
    assert run(config, folder)[0].step == 3
  assert read_meta(folder / "checkpoints")[1]["skipped"] == 2
  run(config, folder)
  counts = [
    (x["step"], x["skipped_steps"])
    for x in RunFolder(folder).read_metrics()
    if x["kind"] == "train"
  ]
  assert counts == [(1, 0), (4, 2), (6, 3)]
  assert read_meta(folder / "checkpoints")[1]["skipped"] == 3
  assert len(list(folder.glob("skipped-step-*"))) == 3


def test_a_row_of_skipped_steps_goes_on_in_a_resumed_run(
  tmp_path: Path, monkeypatch
) -> None:
  monkeypatch.setattr(nonfinite_steps, "IN_A_ROW", 3)
  folder, config = tmp_path / "run", tiny(nan="skip", eval_every=6)
  _spoil(monkeypatch, 1, 2, 3)
  with monkeypatch.context() as patch:
    _stop_after(patch, 3)
    run(config, folder)
  with pytest.raises(TrainingFailed, match="step 3 .* 3 in a row were not"):
    run(config, folder)


def test_too_many_in_a_row_end_the_run(tmp_path: Path, monkeypatch) -> None:
  monkeypatch.setattr(nonfinite_steps, "IN_A_ROW", 2)
  monkeypatch.setattr(nonfinite_steps, "DUMPS", 2)
  _spoil(monkeypatch, 1, 3, 4)
  with pytest.raises(TrainingFailed, match="step 4 .* 2 in a row were not"):
    run(tiny(nan="skip"), tmp_path / "run")
  kept = [x.name for x in (tmp_path / "run").glob("skipped-step-*")]
  assert sorted(kept) == ["skipped-step-1", "skipped-step-3"]


def test_within_returns_raises_or_times_out() -> None:
  assert within(5.0, "it", lambda: 3) == 3
  assert within(None, "it", lambda: 3) == 3
  with pytest.raises(StopIteration):
    within(5.0, "it", iter(()).__next__)
  with pytest.raises(DataTimeout, match=r"it has not come within 0.1 s \(data"):
    within(0.1, "it", threading.Event().wait)


def test_a_hurried_wait_is_shorter(monkeypatch) -> None:
  monkeypatch.setattr(prefetch, "_HURRIED", 0.1)
  for seconds in (30.0, None):
    begin = time.monotonic()
    with pytest.raises(DataTimeout, match=r"it .* within 0.1 s after a signal"):
      within(seconds, "it", threading.Event().wait, lambda: True)
    assert time.monotonic() - begin < 10
    assert within(seconds, "it", lambda: 3, lambda: True) == 3
    slow = threading.Event()
    threading.Timer(0.5, slow.set).start()
    assert within(seconds, "it", slow.wait, lambda: False)


def test_hung_data_ends_the_run_and_loses_nothing(
  tmp_path: Path, folder: Path, trainer: Path
) -> None:
  """In a separate process, which must end although a thread hangs."""
  config = make_config(folder, save_every=100, eval_every=100)
  run_dir = tmp_path / "run"
  before = "\n".join(
    [
      "import time",
      "from train.data.text import lm_batches as lm",
      "read = lm.LMBatches.read_rows",
      "def hang(self, step, *rows):",
      "  if step >= 3: time.sleep(1000)",
      "  return read(self, step, *rows)",
      "lm.LMBatches.read_rows = hang",
    ]
  )
  words = ("train", "lm-tiny", *make_options(config), "--data.timeout", "2")
  process = command(
    *words, "--run-dir", str(run_dir), cache=trainer, before=before
  )
  code, out, err = finish(process)
  assert code == 1, err
  assert "the batch of step 3 has not come within 2 s (data.timeout)" in err
  assert "Traceback" not in err
  step, meta = read_meta(run_dir / "checkpoints")
  assert (step, meta["finished"]) == (2, None)  # its batch was not used yet


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("error", [None, DataTimeout, OSError])
def test_a_batch_is_put_before_the_previous_one_is_used(count, error):
  events = []

  def batches():
    yield from range(count)
    if error is not None:
      raise error("the batch is not there")

  def put(batch):
    events.append(f"put {batch}")
    return batch

  def use() -> None:
    for batch in batch_sharding.put_ahead(batches(), put):
      events.append(f"use {batch}")

  if error is None:
    use()
  else:
    with pytest.raises(error, match="the batch is not there"):
      use()
  expected = {
    0: [],
    1: ["put 0", "use 0"],
    3: ["put 0", "put 1", "use 0", "put 2", "use 1", "use 2"],
  }[count]
  # An error comes instead of the batch before it.
  assert events == (expected if error is None else expected[:-1])
