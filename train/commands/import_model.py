"""`rebased import FILE`: turn a PyTorch checkpoint into an exported model."""

import dataclasses
import os
from typing import Annotated

from rich.console import Console
import tyro

from rebased_jax import presets
from train.commands.export import describe
from train.commands.parsing import parse
from train.console import say
from train.data.checks import require
from train.data.prepare import tokenizer as tokenizer_lib


@dataclasses.dataclass(frozen=True)
class ImportArgs:
  """Turn a checkpoint of the ReBased paper's code or of Zoology into a model.

  Layers of flash-linear-attention inside such a model are known too. The result
  is a folder as `rebased export` writes it.
  """

  #: A .safetensors file, or a file of torch.save, which needs torch. No code in
  #: it is run.
  file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
  #: The mixers of the model: "rebased", "based", "conv-attention" and so on. A
  #: wrong name lists all.
  system: str
  #: The folder to write: a new one.
  out: str
  #: The heads of its mixers, which no array says. None: 12 for ReBased and
  #: Based, 16 for the ReBased of flash-linear-attention, 1 for attention.
  heads: int | None = None
  #: "bytes", a tokenizer.json, or a folder that holds one. None: write none.
  tokenizer: str | None = None
  #: The token of --tokenizer that ends a document.
  eos: str = "auto"


def run(args: list[str]) -> int:
  """Run the verb and return the exit code.

  Args:
    args: the arguments after the verb.

  Raises:
    ValueError: an argument is wrong, or the arrays do not fit the system.
    OSError: the folder cannot be written.
  """
  parsed = parse(ImportArgs, "rebased import", args)
  systems = tuple(sorted({**presets.VARIANTS, **presets.SYSTEMS}))
  known = parsed.system in systems
  require(known, "system", parsed.system, f"one of {systems}")
  kinds = "a .safetensors file, one of torch.save, or a folder of such files"
  require(os.path.exists(parsed.file), "FILE", parsed.file, kinds)
  # Imported when the options are right: jax takes seconds.
  from rebased_jax import model_files, parameter_count, pytorch
  from train import export_model

  model_files.check_new(parsed.out)
  name, eos = None, None
  if parsed.tokenizer is not None:
    tokenizer = tokenizer_lib.load(parsed.tokenizer, parsed.eos)
    name, eos = export_model.name_tokenizer(tokenizer), tokenizer.spec.eos
  model = pytorch.load(parsed.file, system=parsed.system, heads=parsed.heads)
  model_files.save(model, parsed.out, tokenizer=name, eos=eos)
  console, config = Console(), model.config
  count = parameter_count(model)
  say(
    console,
    f"{parsed.file}: {count:,} parameters, {config.layers} layers, width "
    f"{config.width}, vocabulary {config.vocab_size}",
  )
  for which in ("first", "second"):
    say(console, f"  {which}: {getattr(config, which)}")
  say(console, describe(parsed.out))
  return 0
