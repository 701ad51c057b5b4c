"""The PyTorch peer of train_step.py: asked for, run, and put beside ours."""

from collections.abc import Sequence
import json
from pathlib import Path
import subprocess
import sys
from typing import Any

import train_step_cases
from train_step_cases import Case

from rebased_jax.mixers import AttentionConfig
from train.devices import peaks

NAME = "torch.compile"


def request(cases: Sequence[Case], args, warm: int) -> dict[str, Any] | None:
  """What `train_step_torch.py` is to measure; None of no attention model."""
  chosen = [x for x in cases if isinstance(x.model.second, AttentionConfig)]
  if not chosen:
    return None
  model, optimizer = chosen[0].model, train_step_cases.OPTIMIZER
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
  """The peer's rows; one of them says what went wrong, if anything did.

  Args:
    wanted: of `request`.
    kind: of the device, for MFU.
    limit: seconds for all of it.
  """
  script = Path(__file__).parent / "train_step_torch.py"
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
  """Raises SystemExit where a peer is of another size than ours."""
  ours = {(x["case"], x["length"]): x["parameters"] for x in rows}
  for peer in peers:
    count = ours[peer["case"], peer["length"]]
    if peer.get("parameters", count) != count:
      raise SystemExit(f"the peer is another model, no times: {peer}, {count}")
