"""Run the PyTorch peer of `run.py` in a separate process."""

from collections.abc import Sequence
import json
from pathlib import Path
import subprocess
import sys
from typing import Any

from benchmarks.train_step import cases as step_cases
from benchmarks.train_step.cases import Case
from rebased_jax.mixers import AttentionConfig
from train.devices import peaks

NAME = "torch.compile"


def request(cases: Sequence[Case], args, warm: int) -> dict[str, Any] | None:
  """Return what `torch_step.py` is to measure.

  Returns:
    Sizes, optimiser and shapes; None if no case is an attention model.
  """
  chosen = [x for x in cases if isinstance(x.model.second, AttentionConfig)]
  if not chosen:
    return None
  model, optimizer = chosen[0].model, step_cases.OPTIMIZER
  names = ("learning_rate", "beta1", "beta2", "weight_decay", "clip_norm")
  return {
    "width": model.width,
    "layers": model.layers,
    "heads": model.second.heads,
    "hidden": model.mlp_width,
    "vocab_size": model.vocab_size,
    "dropout": model.dropout,
    **{name: getattr(optimizer, name) for name in names},
    "warmup_steps": optimizer.warmup_steps,
    "compile": not args.tiny,
    "warm": warm,
    "seconds": args.seconds,
    "rounds": args.rounds,
    "cases": [x.row | {"positions": x.model.positions} for x in chosen],
  }


def measure(wanted: dict[str, Any], kind: str, limit: float) -> list[dict]:
  """Return the peer's rows; a row that failed says why.

  Args:
    wanted: the result of `request`.
    kind: jax's name of the device, for the MFU.
    limit: the time limit in seconds, for all rows together.
  """
  script = Path(__file__).parent / "torch_step.py"
  command = [sys.executable, str(script), json.dumps(wanted)]
  failure = None
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    try:
      out, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
      process.kill()
      out, _ = process.communicate()
      failure = f"not done after {limit:.0f} s"
  rows = [json.loads(x) for x in out.splitlines() if x.startswith("{")]
  if process.returncode and failure is None:
    failure = f"exit code {process.returncode}"
  for row in rows:
    row["peer"] = NAME
    if "failed" not in row:
      rate = row["tokens_per_second"]
      found = peaks.mfu(rate, row["parameters"], kind, 1)
      row["mfu"] = found and round(found, 4)
  for case in wanted["cases"][len(rows) :]:
    place = {name: case[name] for name in ("case", "length", "rows")}
    rows.append(place | {"peer": NAME, "failed": failure or "no result"})
  return rows


def check(peers: Sequence[dict], rows: Sequence[dict]) -> None:
  """Raise SystemExit if a peer has another number of parameters than ours."""
  ours = {(x["case"], x["length"]): x["parameters"] for x in rows}
  for peer in peers:
    count = ours[peer["case"], peer["length"]]
    if peer.get("parameters", count) != count:
      raise SystemExit(
        f"the peer is another model, not timed: {peer}; expected {count} "
        "parameters"
      )
