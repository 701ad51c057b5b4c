"""Test `rebased import`: the folder it writes, and its errors."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from train_cases import call as call, trainer as trainer

import rebased_jax
from rebased_jax import BaseConvConfig, BasedConfig

_GOLDEN = Path(__file__).parents[1] / "golden" / "based.npz"


def test_import_writes_a_model_that_load_reads(call, tmp_path: Path) -> None:
  with np.load(_GOLDEN) as golden:
    arrays = {
      name.removeprefix("param/"): x.astype(np.float32)
      for name, x in golden.items()
      if name.startswith("param/")
    }
  save_file(arrays, tmp_path / "based.safetensors")
  words = ("import", str(tmp_path / "based.safetensors"))
  out = tmp_path / "model"
  code, _, err = call(*words, "--system", "rebased", "--out", str(out))
  assert code == 2 and "query_affine/gamma is missing" in err, err
  code, _, err = call(*words, "--system", "any", "--out", str(out))
  assert code == 2 and "conv-attention" in err, err
  options = ("--system", "based", "--out", str(out), "--tokenizer")
  code, _, err = call(*words, *options, "bytes")
  assert code == 2 and "eos=256: expected a token of the model" in err, err
  assert not out.exists()
  code, shown, err = call(*words, *options, "bytes", "--eos", "none")
  assert (code, err) == (0, "") and "2 layers, width 32, vocabulary 64" in shown
  assert "BasedConfig(heads=12, features=16" in shown
  model = rebased_jax.load(out)
  assert model.config.first == BaseConvConfig()
  assert model.config.second == BasedConfig(eps=1e-12)
  np.testing.assert_array_equal(
    model.token_embedding[...],
    arrays["backbone.embeddings.word_embeddings.weight"],
  )
  code, shown, err = call("inspect", str(out), "--all")
  assert (code, err) == (0, "") and "│ second.eps" in shown, shown
  assert "tokenizer: {'type': 'bytes', 'eos': None" in shown
  for verb in ("resume", "export"):
    words = (verb, str(out), *(("--out", "x") if verb == "export" else ()))
    code, _, err = call(*words)
    assert code == 2 and "it is of an exported model: expected" in err, err
