"""Kill training runs at random moments, and check that they resume exactly.

    python tools/kill_runs.py [--kills 20] [--write]

A small MQAR run and a small text run are trained undisturbed. Each is trained
again with SIGKILL at random moments: while it starts and compiles, in a step,
and while it writes a checkpoint. The same command resumes it each time. In the
end, every array of the last checkpoint must be bit-identical to the undisturbed
run, and every logged loss must be equal. --write saves the result to
benchmarks/results/kills.json.
"""

import argparse
from collections.abc import Callable, Sequence
import dataclasses
import json
import os
from pathlib import Path
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import environment  # noqa: E402

STEPS = 120
MOMENTS = ("start", "step", "save")
_MODEL = ("--model.width", "32", "--model.second.heads", "2")
_RUN = (
  *("--steps", str(STEPS), "--batch", "8", "--log-every", "1"),
  *("--eval-every", "20", "--save-every", "2", "--keep", "2"),
  *("--optimizer.warmup-steps", "10", "--model.dropout", "0.1"),
)
RUNS = {
  "mqar": (
    *("mqar", *_MODEL, *_RUN, "--data.test-examples", "16"),
    *("--stop-accuracy", "None"),
  ),
  "lm-tiny": (
    *("lm-tiny", *_MODEL, *_RUN, "--model.mlp-width", "64"),
    *("--data.length", "64", "--data.eval-rows", "16"),
  ),
}
# Makes steps slow, so that kills happen inside them and not after the end.
_SLOW = """
import time
from train.devices import batch_sharding
put = batch_sharding.put_batch
def slow_put(*args):
  time.sleep(0.05)
  return put(*args)
batch_sharding.put_batch = slow_put
"""


@dataclasses.dataclass(frozen=True)
class Kill:
  """One kill, and the state of the run folder after it."""

  aimed: str  # the moment that the kill waited for: one of MOMENTS
  found: str  # the moment at which it happened, judged by the folder
  step: int  # the step of the last record
  saved: int  # the step of the newest checkpoint; −1 if there is none


def start(
  words: Sequence[str], folder: Path, work: Path, before: str = ""
) -> subprocess.Popen:
  """Start `rebased train WORDS` in a child process, with this run folder."""
  code = f"{before}\nfrom train.cli import main\nmain()"
  surroundings = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(environment.ROOT),
    "JAX_COMPILATION_CACHE_DIR": str(work / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
  }
  return subprocess.Popen(
    [sys.executable, "-c", code, "train", *words, "--run-dir", str(folder)],
    cwd=work,
    env=surroundings,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def killed(
  words: Sequence[str], folder: Path, work: Path, rng: random.Random, aim: str
) -> Kill | None:
  """Start a run and kill it; return None if the run ended first."""
  known = len(records(folder))
  process = start(words, folder, work, _SLOW)
  reached = {
    "start": lambda: True,
    "step": lambda: len(records(folder)) > known,
    "save": lambda: len(records(folder)) > known and unfinished(folder),
  }[aim]
  _wait(process, reached)
  longest = {"start": 6.0, "step": 1.0, "save": 0.05}[aim]
  time.sleep(rng.uniform(0, longest))
  if process.poll() is None:
    process.kill()
  out, _ = process.communicate()
  if process.returncode == 0:
    return None
  if process.returncode != -signal.SIGKILL:
    raise SystemExit(
      f"a run failed with exit code {process.returncode}:\n{out}"
    )
  after = records(folder)
  found = "start"  # an earlier kill may have left an unfinished checkpoint
  if len(after) > known:
    found = "save" if unfinished(folder) else "step"
  return Kill(
    aim, found, max((x["step"] for x in after), default=0), saved(folder)
  )


def _wait(process: subprocess.Popen, reached: Callable[[], object]) -> None:
  while process.poll() is None and not reached():
    time.sleep(0.002)


def records(folder: Path) -> list[dict]:
  """Return the complete lines of a run's metrics."""
  path = folder / "metrics.jsonl"
  text = path.read_text() if path.exists() else ""
  return [
    json.loads(x) for x in text.splitlines(keepends=True) if x[-1] == "\n"
  ]


def unfinished(folder: Path) -> list[Path]:
  """Return the checkpoints whose writing has not finished."""
  return [
    x
    for x in (folder / "checkpoints").glob("*")
    if not x.name.isdecimal() and not x.name.endswith(".corrupt")
  ]


def saved(folder: Path) -> int:
  steps = [x.name for x in (folder / "checkpoints").glob("*")]
  return max((int(x) for x in steps if x.isdecimal()), default=-1)


def end(folder: Path) -> tuple[dict, list]:
  """Return hashes of the last checkpoint's arrays, and all logged losses."""
  state = folder / "checkpoints" / str(STEPS)
  if not state.exists():
    raise SystemExit(f"{folder}: expected a checkpoint of step {STEPS}")
  losses = [(x["kind"], x["step"], x["loss"]) for x in records(folder)]
  return _arrays(folder), losses


def _arrays(folder: Path) -> dict:
  """Return dtype, shape and hash of each array, as a trainer restores it."""
  code = """
  import hashlib, json, sys
  import jax, numpy as np
  from train import compiled_steps
  from train.checkpoint.checkpoints import Checkpoints
  from train.devices import mesh
  from train.records.run_folder import RunFolder
  folder = RunFolder(sys.argv[1])
  config, devices = folder.read_config(), mesh.make_mesh()
  with jax.set_mesh(devices):
    abstract = compiled_steps.to_dicts(
      compiled_steps.build(config, devices).abstract
    )
    with Checkpoints(folder.checkpoints, keep=config.keep) as checkpoints:
      found = checkpoints.restore(abstract)
  assert not found.broken and found.step == config.steps
  leaves = jax.tree_util.tree_leaves_with_path(found.state)
  print(json.dumps({
    jax.tree_util.keystr(path): [
      str(x.dtype), x.shape, hashlib.sha256(np.asarray(x).tobytes()).hexdigest()
    ]
    for path, x in leaves
  }))
  """
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(code), str(folder)],
    env=os.environ
    | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(environment.ROOT)},
    capture_output=True,
    text=True,
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def prepared(work: Path) -> Path:
  """Prepare tokens of three files of the standard library."""
  texts, out = work / "texts", work / "tokens"
  texts.mkdir()
  for module in (argparse, textwrap, tempfile):
    name = Path(module.__file__).name
    shutil.copy(module.__file__, texts / f"{name}.txt")
  subprocess.run(
    [sys.executable, "-m", "train", "prepare", str(texts), "--out", str(out)],
    env=os.environ | {"PYTHONPATH": str(environment.ROOT)},
    stdout=subprocess.DEVNULL,
    check=True,
  )
  return out


def trial(name: str, kills: int, seed: int, work: Path) -> dict:
  """Kill a run `kills` times and compare it with the undisturbed one.

  If the run reaches its end earlier, it starts again in another folder.
  """
  rng, words = random.Random(seed), RUNS[name]
  if name.startswith("lm"):
    words = (*words, "--data.path", str(prepared(work)))
  undisturbed = work / f"{name}-undisturbed"
  _finish(words, undisturbed, work)
  expected, made, folders = end(undisturbed), [], []
  while len(made) < kills:
    folder = work / f"{name}-{len(folders)}"
    folders.append(folder)
    while len(made) < kills:
      aim = rng.choice(MOMENTS)
      kill = killed(words, folder, work, rng, aim)
      if kill is None:
        break
      made.append(kill)
      print(f"{name}: kill {len(made)}: {kill}", flush=True)
    _finish(words, folder, work)
  equal = [end(folder) == expected for folder in folders]
  return {
    "kills": len(made),
    "fell_in": {x: sum(k.found == x for k in made) for x in MOMENTS},
    "runs": len(folders),
    "arrays": len(expected[0]),
    "losses": len(expected[1]),
    "same_bits": all(equal),
    "each": [dataclasses.asdict(kill) for kill in made],
  }


def _finish(words: Sequence[str], folder: Path, work: Path) -> None:
  process = start(words, folder, work)
  out, _ = process.communicate()
  if process.returncode != 0:
    raise SystemExit(
      f"{folder}: failed with exit code {process.returncode}:\n{out}"
    )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=20, help="kills of each run")
  parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--write", action="store_true")
  options = parser.parse_args()
  results = {**environment.describe("train", "rebased_jax"), "trials": {}}
  for name in options.runs:
    with tempfile.TemporaryDirectory() as work:
      found = trial(name, options.kills, options.seed, Path(work))
    results["trials"][name] = found
    print(name, {x: y for x, y in found.items() if x != "each"}, flush=True)
  if options.write:
    path = environment.RESULTS / "kills.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
  if not all(x["same_bits"] for x in results["trials"].values()):
    raise SystemExit("a resumed run differs from the undisturbed one")


if __name__ == "__main__":
  main()
