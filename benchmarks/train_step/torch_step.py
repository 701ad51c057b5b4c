"""Measure a compiled PyTorch training step of the attention model.

`run.py` starts this script before jax takes the device. The argument is JSON
with the model and the shapes. The script prints a line of JSON for each shape,
with the fields of `run.py`.

The model has exactly the parameters of `pile_attention`: pre-norm blocks of
softmax attention (q, k, v without biases) and an MLP with the exact GELU,
learned positions, one table for embedding and logits, dropout on embeddings.
Parameters are float32, compute is bfloat16 by autocast. AdamW is fused and
decays the matrices; clipping and learning rates are ours. The model runs under
`torch.compile`, with the attention kernel that is fastest alone. Tokens come
from pinned memory, and a loss is read one step later.
"""

import json
import math
import statistics
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
KERNELS = ("flash", "cudnn") if CUDA else ("math",)


class Block(nn.Module):
  """Pre-norm softmax attention and MLP."""

  def __init__(self, width: int, heads: int, hidden: int):
    super().__init__()
    self.heads = heads
    self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
    self.qkv = nn.Linear(width, 3 * width, bias=False)
    self.out = nn.Linear(width, width)
    self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

  def forward(self, x_BTD):
    """Return the residual stream after the block."""
    B, T, D = x_BTD.shape
    qkv_BTCHF = self.qkv(self.norm1(x_BTD)).view(B, T, 3, self.heads, -1)
    q, k, v = qkv_BTCHF.permute(2, 0, 3, 1, 4)
    o_BHTF = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    x_BTD = x_BTD + self.out(o_BHTF.transpose(1, 2).reshape(B, T, D))
    hidden = functional.gelu(self.up(self.norm2(x_BTD)))
    return x_BTD + self.down(hidden)


class Model(nn.Module):
  """The language model; its output is the mean loss."""

  def __init__(self, sizes: dict, positions: int):
    super().__init__()
    width, layers = sizes["width"], sizes["layers"]
    self.dropout = sizes["dropout"]
    self.tokens = nn.Embedding(sizes["vocab_size"], width)
    self.positions = nn.Embedding(positions, width)
    block = lambda: Block(width, sizes["heads"], sizes["hidden"])
    self.blocks = nn.ModuleList(block() for _ in range(layers))
    self.norm = nn.LayerNorm(width)
    for name, value in self.named_parameters():
      if name.endswith("bias"):
        nn.init.zeros_(value)
      elif value.ndim == 2:
        deep = "out." in name or "down." in name
        nn.init.normal_(value, 0, 0.02 / math.sqrt(2 * layers if deep else 1))

  def forward(self, tokens_BT, targets_BT):
    """Return the mean cross entropy of the targets."""
    steps_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    x_BTD = self.tokens(tokens_BT) + self.positions(steps_T)
    x_BTD = functional.dropout(x_BTD, self.dropout)
    for block in self.blocks:
      x_BTD = block(x_BTD)
    logits_BTV = functional.linear(self.norm(x_BTD), self.tokens.weight)
    return functional.cross_entropy(
      logits_BTV.flatten(0, 1), targets_BT.flatten()
    )


def choose(kernel: str) -> None:
  """Make PyTorch use this attention kernel."""
  torch.backends.cuda.enable_flash_sdp(kernel == "flash")
  torch.backends.cuda.enable_cudnn_sdp(kernel == "cudnn")
  torch.backends.cuda.enable_mem_efficient_sdp(False)
  torch.backends.cuda.enable_math_sdp(kernel == "math")


def attention_seconds(kernel: str, shape: tuple[int, ...]) -> float:
  """Measure one layer's attention, both passes; inf if it is unsupported."""
  choose(kernel)
  q, k, v = (
    torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    for _ in range(3)
  )

  def run(count: int) -> float:
    synchronize()
    begin = time.perf_counter()
    for _ in range(count):
      o = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
      torch.autograd.grad(o, (q, k, v), torch.ones_like(o))
    synchronize()
    return (time.perf_counter() - begin) / count

  try:
    run(3)
    return min(run(10) for _ in range(3))
  except RuntimeError:
    return math.inf


def synchronize() -> None:
  if CUDA:
    torch.cuda.synchronize()


class Runner:
  """Runs steps over random tokens and reads each loss one step later."""

  def __init__(self, model: Model, case: dict, sizes: dict):
    decayed = [
      x
      for name, x in model.named_parameters()
      if name.startswith("blocks.") and x.ndim == 2
    ]
    ids = {id(x) for x in decayed}
    others = [x for x in model.parameters() if id(x) not in ids]
    self.optimizer = torch.optim.AdamW(
      [
        {"params": decayed, "weight_decay": sizes["weight_decay"]},
        {"params": others, "weight_decay": 0.0},
      ],
      lr=sizes["learning_rate"],
      betas=(sizes["beta1"], sizes["beta2"]),
      fused=True,
    )
    warmup = sizes["warmup_steps"]
    self.schedule = torch.optim.lr_scheduler.LambdaLR(
      self.optimizer, lambda step: min((step + 1) / warmup, 1)
    )
    self.clip, self.parameters = sizes["clip_norm"], list(model.parameters())
    self.model = model
    if sizes["compile"]:
      self.model = torch.compile(model, dynamic=False)
    rng = np.random.default_rng(0)
    shape = (4, case["rows"], case["length"] + 1)
    tokens_4BW = torch.from_numpy(rng.integers(0, sizes["vocab_size"], shape))
    self.batches = tokens_4BW.pin_memory() if CUDA else tokens_4BW
    self.losses, self.pending = [], None

  def steps(self, count: int) -> float:
    """Run `count` steps and return their seconds, until the last loss."""
    begin = time.perf_counter()
    for index in range(count):
      batch_BW = self.batches[index % 4].to(DEVICE, non_blocking=True)
      with torch.autocast(DEVICE, torch.bfloat16):
        loss = self.model(
          batch_BW[:, :-1].contiguous(), batch_BW[:, 1:].contiguous()
        )
      loss.backward()
      nn.utils.clip_grad_norm_(self.parameters, self.clip)
      self.optimizer.step()
      self.optimizer.zero_grad(set_to_none=True)
      self.schedule.step()
      self._settle()
      self.pending = loss.detach()
    self._settle()
    synchronize()
    return time.perf_counter() - begin

  def _settle(self) -> None:
    if self.pending is not None:
      self.losses.append(self.pending.item())
      self.pending = None


def measure(case: dict, sizes: dict) -> dict:
  """Return the row of a shape."""
  begin = time.perf_counter()
  heads, rows, length = sizes["heads"], case["rows"], case["length"]
  shape = (rows, heads, length, sizes["width"] // heads)
  seconds = {kernel: attention_seconds(kernel, shape) for kernel in KERNELS}
  kernel = min(seconds, key=seconds.get)
  choose(kernel)
  torch.manual_seed(0)
  if CUDA:
    torch.cuda.reset_peak_memory_stats()
  model = Model(sizes, case["positions"]).to(DEVICE)
  runner = Runner(model, case, sizes)
  runner.steps(sizes["warm"])
  one = runner.steps(1)
  each = max(int(sizes["seconds"] / sizes["rounds"] / one), 2)
  times = [runner.steps(each) / each for _ in range(sizes["rounds"])]
  if not np.isfinite(runner.losses).all():
    return {"failed": "a loss is not finite"}
  step = statistics.median(times)
  return {
    "parameters": sum(x.numel() for x in model.parameters()),
    "kernels": [kernel, "torch.compile" if sizes["compile"] else "eager"],
    "attention_ms": {k: round(1e3 * x, 3) for k, x in seconds.items()},
    "first_loss": round(runner.losses[0], 4),
    "step_ms": round(1e3 * step, 2),
    "step_ms_of_rounds": [round(1e3 * x, 2) for x in times],
    "steps": each * sizes["rounds"],
    "tokens_per_second": round(rows * length / step),
    "device_peak_bytes": torch.cuda.max_memory_allocated() if CUDA else None,
    "seconds": round(time.perf_counter() - begin, 1),
    "torch": torch.__version__,
  }


def main() -> None:
  sizes = json.loads(sys.argv[1])
  torch.set_float32_matmul_precision("high")
  for case in sizes["cases"]:
    row = {name: case[name] for name in ("case", "length", "rows")}
    try:
      row |= measure(case, sizes)
    except (RuntimeError, AssertionError) as error:
      # Also out of memory and compiler errors. Other shapes may work.
      reason = str(error).strip().splitlines() or [type(error).__name__]
      row["failed"] = reason[0][:300]
    torch.compiler.reset()
    if CUDA:
      torch.cuda.empty_cache()
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
  main()
