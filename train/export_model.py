"""Write the model of a run to a folder that any program can read.

`rebased_jax.model_files` has the form of the folder. A run on text also gives
its tokenizer, so that the folder says what its tokens are.
"""

import os
from pathlib import Path

from etils import epath

from rebased_jax import LM, model_files
from rebased_jax.tensor_files import MAX_FILE_BYTES
from train import trained_model
from train.checkpoint.checkpoints import read_meta
from train.config import TextData
from train.data.batches import Fingerprint
from train.data.checks import require
from train.data.prepare import tokenizer as tokenizer_lib
from train.data.prepare.tokenizer import FileTokenizer, Tokenizer
from train.records.run_folder import RunFolder
from train.text_completion import (
  ModelSource,
  find_tokenizer,
  recorded_tokenizers,
)

NO_TOKENIZER = "none"


def export(
  run_dir: epath.PathLike,
  out: str | os.PathLike[str],
  source: ModelSource,
  *,
  max_file_bytes: int = MAX_FILE_BYTES,
) -> tuple[LM, int]:
  """Write the model of a run to a new folder.

  Args:
    run_dir: the folder of the run.
    out: the folder to write, which appears whole or not at all.
    source: the step of the checkpoint, and a copy of the tokenizer that lies
      elsewhere. A tokenizer of "none" writes none.
    max_file_bytes: the size above which the weights are several files.

  Returns:
    The model, and the step of its checkpoint.

  Raises:
    ValueError: `run_dir` is no run, its tokenizer is missing or has changed, or
      `out` is not empty.
    CheckpointError: there is no such checkpoint, or it is unreadable.
    OSError: the folder cannot be written.
  """
  model_files.check_new(out)
  folder = RunFolder(run_dir)
  config = folder.read_config()
  folder.check_checkpoints()
  step, meta = read_meta(folder.checkpoints, source.step, run=folder.run_id())
  tokenizer, eos = None, None
  if isinstance(config.data, TextData):
    tokenizer, eos = _find_tokenizer(config.data, meta["data"], source)
  else:
    expected = "None: the run's data is not text"
    name = source.tokenizer
    require(name in (None, NO_TOKENIZER), "tokenizer", name, expected)
  model = trained_model.load(run_dir, step, weights=source.weights)
  model_files.save(
    model, out, tokenizer=tokenizer, eos=eos, max_file_bytes=max_file_bytes
  )
  return model, step


def _find_tokenizer(
  data: TextData, fingerprint: Fingerprint, source: ModelSource
) -> tuple[str | Path | None, int | None]:
  """Return the tokenizer's file or "bytes", and the end of a document.

  Both are None where there is no tokenizer.
  """
  unknown = source.tokenizer is None and not recorded_tokenizers(fingerprint)
  if source.tokenizer == NO_TOKENIZER or unknown:
    return None, None
  tokenizer, eos = find_tokenizer(data, fingerprint, source)
  return name_tokenizer(tokenizer), eos


def name_tokenizer(tokenizer: Tokenizer) -> str | Path:
  """Return a tokenizer's file, or "bytes", as `rebased_jax.save` takes it."""
  return (
    tokenizer.path
    if isinstance(tokenizer, FileTokenizer)
    else tokenizer_lib.BYTES
  )
