"""Train on Pythia's tokens of the Pile: both of its data sets."""

from pathlib import Path

from data_cases import write_megatron
import numpy as np
import pytest
from train_cases import call as call, trainer as trainer

from train.config import RunConfig
from train.data.text.megatron_source import MegatronSource
from train.records.run_folder import RunFolder

_SMALL = (
  *("--steps", "4", "--eval-every", "4", "--optimizer.warmup-steps", "2"),
  *("--model.width", "16", "--model.pairs", "1", "--model.mlp-width", "16"),
  *("--model.second.heads", "2", "--data.cache-dir", "plans", "--batch", "8"),
  *("--model.vocab-size", "512"),
)
_VOCABULARY = 500  # instead of GPT-NeoX's 50,277; token 0 ends a document


def _cuts(total: int, shards: int) -> list[int]:
  """Return shard boundaries: all shards but the last have one odd size."""
  size = total // shards | 1
  return [size * i for i in range(1, shards)]


def _train(call, *options: str) -> RunConfig:
  """Train lm-tiny in the folder "run", and return its config."""
  code, out, err = call(
    *("train", "lm-tiny", "--run-dir", "run", *_SMALL, *options)
  )
  assert code == 0 and "held-out perplexity" in out, err
  return RunFolder("run").read_config()


def test_preshuffled_rows(call, tmp_path: Path) -> None:
  """Rows of 2049 uint16 tokens are read in the order in which Pythia did."""
  random = np.random.default_rng(0)
  rows = random.integers(0, _VOCABULARY, (64, 2049))
  cuts = _cuts(rows.size * 2, 21)
  path = write_megatron(tmp_path / "document", list(rows), cuts=cuts)
  assert (tmp_path / "document-00020-of-00020.bin").exists()
  config = _train(
    call,
    *("--data.path", str(path), "--data.packing", "rows"),
    *("--data.length", "2048", "--data.no-shuffle", "--data.eval-rows", "2"),
    *("--steps", "2", "--eval-every", "2", "--optimizer.warmup-steps", "1"),
  )
  data = config.data.train_batches(config.batch, config.seed)
  held_out = 3  # of 64, 0.05 of lm-tiny
  assert len(data.parts[0].plan) == 64 - held_out
  for step in range(4):
    expected = rows[8 * step : 8 * step + 8]
    np.testing.assert_array_equal(data[step]["tokens"], expected[:, :-1])
    np.testing.assert_array_equal(data[step]["targets"], expected[:, 1:])
    assert data[step]["weights"].min() == 1
  shown = config.data.eval_batches(8, 0)[0]["tokens"][:2]
  last = {row.tobytes() for row in rows[-held_out:, :-1].astype(np.int32)}
  assert {row.tobytes() for row in shown} < last


@pytest.mark.parametrize("held_out", ["end", "documents"])
def test_document_wise_idxmaps(call, tmp_path: Path, held_out: str) -> None:
  """Each sequence is a document; samples share a token, as in GPT-NeoX."""
  random = np.random.default_rng(1)
  sizes = random.integers(1, 200, 120)
  texts = [np.append(random.integers(1, _VOCABULARY, n), 0) for n in sizes]
  stem = "pile_0.87_deduped_text_document"
  cuts = _cuts(sum(map(len, texts)) * 2, 83)
  path = write_megatron(tmp_path / stem, texts, cuts=cuts)
  assert (tmp_path / f"{stem}-00082-of-00082.bin").exists()
  config = _train(
    call,
    *("--data.path", str(path), "--data.length", "64", "--data.no-shuffle"),
    *("--data.held-out", held_out, "--data.validation", "0.1"),
  )
  data = config.data.train_batches(config.batch, config.seed)
  source, plan = data.parts[0]
  assert isinstance(source, MegatronSource) and len(source.shards) == 83
  chosen = np.arange(120)
  if held_out == "documents":
    chosen = plan.document_n
    others = config.data.eval_batches(8, 0).parts[0].plan.document_n
    assert sorted([*chosen, *others]) == list(range(120)) and len(others) > 3
  stream = np.concatenate([texts[i] for i in chosen])
  for step in range(config.steps):
    for row in range(8):
      first = 64 * (8 * step + row)
      expected = stream[first : first + 65]
      np.testing.assert_array_equal(data[step]["tokens"][row], expected[:-1])
      np.testing.assert_array_equal(data[step]["targets"][row], expected[1:])
