"""Measure generation and evaluation against the length: speed and memory.

    python benchmarks/decode/run.py
    python benchmarks/decode/run.py --quick

ReBased has a state of constant size, softmax attention a cache as long as the
context. Both are language models of equal width and depth without learned
positions. Four things are measured:

* the time and the device's peak memory of the loss of a text of T tokens, for
  ReBased;
* tokens a second after a context of T tokens, one block of greedy tokens after
  another, from a state that holds T tokens. Its values do not matter to the
  time, so that no context is read for it. Also of many rows together;
* the bytes of that state;
* the time to the first token after a prompt of T tokens, which is read in
  pieces.

Logits from prefill and step are first compared with those of the whole row.
The script exits with 1 if they are wrong. Times are those of the fastest round.
A case that does not fit the memory is recorded as such. The file is written
after every case.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path
import sys
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.environment import (  # noqa: E402
  RESULTS,
  describe,
  peak_bytes,
)
import rebased_jax as rj  # noqa: E402
from rebased_jax import evaluate, generation  # noqa: E402

SOURCES = ("pallas_kernels", "rebased_jax")
SYSTEMS = ("ReBased", "Attention")
CHECKED = 64  # tokens of the row whose logits are compared
# A case runs for so many seconds, but this often at least and at most. A slow
# one runs less often.
SECONDS, FEWEST, MOST = 1.0, 3, 50
SLOW_SECONDS = 10.0
# The largest |a − b| / max |b| of logits.
TOLERANCE = {"bfloat16": 0.1, "float32": 1e-3}


@dataclasses.dataclass(frozen=True)
class Sizes:
  """The models and the lengths of a run."""

  width: int
  pairs: int
  heads: int
  vocab_size: int
  dtype: str
  block: int  # tokens of a measured block
  texts: tuple[int, ...]  # tokens of the texts that are evaluated
  contexts: tuple[int, ...]  # with one row
  prompts: tuple[int, ...]
  batches: tuple[int, ...]  # rows that are continued together
  batch_context: int  # the context of those rows


# The paper's Pile models have 12 layers of width 768.
FULL = Sizes(
  width=768,
  pairs=6,
  heads=12,
  vocab_size=50304,
  dtype="bfloat16",
  block=128,
  texts=(1 << 14, 1 << 17, 1 << 20),
  contexts=(1 << 10, 1 << 13, 1 << 16, 1 << 18, 1 << 20),
  prompts=(1 << 13, 1 << 15, 1 << 17),
  batches=(64, 512),
  batch_context=1 << 13,
)
QUICK = Sizes(
  width=64,
  pairs=1,
  heads=4,
  vocab_size=257,
  dtype="float32",
  block=16,
  texts=(1 << 11, 1 << 13),
  contexts=(1 << 8, 1 << 11, 1 << 14),
  prompts=(1 << 7, 1 << 9, 1 << 11),
  batches=(8,),
  batch_context=1 << 8,
)


def make_model(system: str, sizes: Sizes, length: int) -> rj.LM:
  """Return a model whose caches hold `length` tokens."""
  second = {
    "ReBased": rj.ReBasedConfig(heads=sizes.heads),
    "Attention": rj.AttentionConfig(heads=sizes.heads, length=length),
  }[system]
  config = rj.ModelConfig(
    first=rj.BaseConvConfig(),
    second=second,
    vocab_size=sizes.vocab_size,
    width=sizes.width,
    pairs=sizes.pairs,
    mlp_width=4 * sizes.width,
    dtype=sizes.dtype,
  )
  return rj.LM(config, rngs=nnx.Rngs(0))


def error(model: rj.LM) -> float:
  """Return the error of the logits of prefill and a step after it."""
  V = model.config.vocab_size
  tokens_BT = jax.random.randint(jax.random.key(1), (1, CHECKED), 0, V)
  wanted_V = jax.jit(model)(tokens_BT)[0, -1]
  _, state = model.prefill(tokens_BT[:, :-1], model.init_state(1))
  found_V = model.step(tokens_BT[:, -1], state)[0][0]
  return float(jnp.abs(found_V - wanted_V).max() / jnp.abs(wanted_V).max())


def evaluate_text(model: rj.LM, T: int) -> dict[str, Any]:
  """Return the time and the memory of the loss of a text of T tokens.

  The device's peak is that of all cases so far: this is the first measurement,
  and shorter texts come first.
  """
  V = model.config.vocab_size
  text_T = np.random.default_rng(0).integers(0, V, T)
  start = time.perf_counter()
  (found,) = evaluate.loglikelihood(model, [text_T], rows=1)
  seconds = time.perf_counter() - start
  return {
    "loss": -found.total / found.tokens,
    "seconds_with_compilation": seconds,
    "tokens_per_second": T / seconds,
  }


def decode(model: rj.LM, T: int, rows: int, sizes: Sizes) -> dict[str, Any]:
  """Return the speed after T tokens, and the bytes that a token may move."""
  state = jax.tree.map(
    lambda x: jnp.full_like(x, T) if x.dtype == jnp.int32 else x,
    model.init_state(rows),
  )
  size = sum(x.nbytes for x in jax.tree.leaves(state))
  blocks = generation.stream(
    model,
    [np.zeros(1, np.int32)] * rows,
    steps=new_tokens(sizes),
    state=state,
    block=sizes.block,
  )
  next(blocks), next(blocks)  # the first token, and the block that compiles
  seconds = _seconds(lambda: next(blocks))
  parameters = jax.tree.leaves(nnx.state(model, nnx.Param))
  return {
    "parameter_bytes": sum(x.nbytes for x in parameters),
    "state_bytes": size,
    "ms_per_token": 1e3 * seconds / sizes.block,
    "tokens_per_second": rows * sizes.block / seconds,
  }


def first_token(model: rj.LM, T: int) -> dict[str, Any]:
  """Return the seconds to the first token after a prompt of T tokens."""
  V = model.config.vocab_size
  prompt_1T = np.random.default_rng(0).integers(0, V, (1, T))
  run = lambda: rj.generate(model, prompt_1T, steps=1)
  run()  # compiles
  return {"first_token_seconds": _seconds(run)}


def new_tokens(sizes: Sizes) -> int:
  """Return the most new tokens of a case: the first, and all blocks."""
  return 1 + sizes.block * (MOST + 1)


def _seconds(run) -> float:
  """Return the seconds of the fastest round."""
  found: list[float] = []
  while not found or (
    sum(found) < SECONDS
    and len(found) < MOST
    or len(found) < FEWEST
    and sum(found) < SLOW_SECONDS
  ):
    start = time.perf_counter()
    jax.block_until_ready(run())
    found.append(time.perf_counter() - start)
  return min(found)


def measured(run, *args: Any) -> dict[str, Any]:
  """Return what a measurement returns, or that it does not fit the memory."""
  try:
    return run(*args)
  except jax.errors.JaxRuntimeError as found:
    if "RESOURCE_EXHAUSTED" not in str(found):
      raise
    return {"out_of_memory": True}


def verdicts(rows: list[dict]) -> list[dict]:
  """Return whether ReBased is level over lengths: memory, state and speed."""
  found = []
  peaks = [x["device_peak"] for x in rows if "text" in x]
  if len(peaks) > 1 and all(peaks):
    found.append(
      {
        "line": "the longest text takes at most 1 % more memory than the "
        "shortest",
        "passed": peaks[-1] <= 1.01 * peaks[0],
      }
    )
  mine = [
    x
    for x in rows
    if x["system"] == "ReBased" and x.get("rows") == 1 and "ms_per_token" in x
  ]
  if len(mine) < 2:
    return found
  times = [x["ms_per_token"] for x in mine]
  return found + [
    {
      "line": "the state of ReBased has one size",
      "passed": len({x["state_bytes"] for x in mine}) == 1,
    },
    {
      "line": "the slowest context of ReBased takes at most 1.25 times as long "
      "as the fastest",
      "passed": max(times) <= 1.25 * min(times),
    },
  ]


def parse() -> argparse.Namespace:
  on_gpu = jax.devices()[0].platform == "gpu"
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "--quick", action="store_true", help="small models, under a minute on a CPU"
  )
  parser.add_argument(
    "--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS)
  )
  out = RESULTS / f"decode_{'gpu' if on_gpu else 'cpu'}.json"
  parser.add_argument("--out", type=Path, default=out)
  return parser.parse_args()


def main() -> None:
  args = parse()
  sizes, load = QUICK if args.quick else FULL, os.getloadavg()[0]
  rows: list[dict[str, Any]] = []

  def record(row: dict[str, Any]) -> None:
    rows.append(row | {"device_peak": peak_bytes()})
    print(json.dumps(row), flush=True)
    result = describe(*SOURCES) | {
      "sizes": dataclasses.asdict(sizes),
      "tolerance": TOLERANCE[sizes.dtype],
      "cores": os.cpu_count(),
      "load_before_and_after": [load, os.getloadavg()[0]],
      "rows": rows,
      "verdicts": verdicts(rows),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")

  for system in args.systems:
    found = error(make_model(system, sizes, CHECKED))
    if not found <= TOLERANCE[sizes.dtype]:
      sys.exit(f"wrong logits, not timed: {system} is {found} off")
    # Short ones first: where one does not fit, longer ones do not either.
    for T in sizes.texts if system == "ReBased" else ():
      row = measured(evaluate_text, make_model(system, sizes, CHECKED), T)
      record({"system": system, "text": T, "error": found} | row)
    cases = [(T, 1) for T in sizes.contexts]
    cases += [(sizes.batch_context, B) for B in sizes.batches]
    for T, B in cases:
      model = make_model(system, sizes, T + new_tokens(sizes))
      row = measured(decode, model, T, B, sizes)
      case = {"system": system, "context": T, "rows": B, "error": found}
      record(case | row)
    for T in sizes.prompts:
      model = make_model(system, sizes, T + 1)
      row = measured(first_token, model, T)
      record({"system": system, "prompt": T, "error": found} | row)
  for line in verdicts(rows):
    print("yes" if line["passed"] else "NO ", line["line"])


if __name__ == "__main__":
  main()
