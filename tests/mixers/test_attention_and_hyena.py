"""Tests of softmax attention and Hyena: counts, caches, filters, errors."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import mixer_equations
from mixer_subject import B, D, T, make, tokens
import model_cases
import numpy as np
import pytest

from pallas_kernels import devices
from rebased_jax import (
  LM,
  Attention,
  AttentionConfig,
  Hyena,
  HyenaConfig,
  ModelConfig,
  Site,
  parameter_count,
)
from rebased_jax.mixers import softmax

_IDS_BT = np.zeros((B, T), np.int32)
_ATTENTION = (1, True, False, None, None, 0.0)


def _make(config, width=D, **site):
  return config.make(Site(width, **site), rngs=nnx.Rngs(0))


def test_rotary_angles_are_those_of_the_paper() -> None:
  """Plane (i, i + F/2) turns by p · 10000^(−2i/F) at position p."""
  F, positions_BT = 6, np.array([[0, 1, 5], [700, 3, 2]], np.int32)
  x_BTHF = np.float32(np.random.default_rng(0).normal(size=(2, 3, 2, F)))
  found = np.asarray(softmax.rotate(x_BTHF, positions_BT), np.float64)
  planes = x_BTHF[..., : F // 2] + 1j * x_BTHF[..., F // 2 :]
  angles = positions_BT[..., None] * 10000.0 ** (-2 * np.arange(3) / F)
  turned = planes * np.exp(1j * angles)[:, :, None]
  wanted = np.concatenate([turned.real, turned.imag], axis=-1)
  np.testing.assert_allclose(found, wanted, atol=1e-4)  # float32 angles of 700


def test_dropout_drops_weights_and_scales_the_rest() -> None:
  """Values that are unit vectors show each weight a_ts."""
  rows, length, p = 64, 24, 0.25
  zero = jnp.zeros((rows, length, 1, length))
  unit = jnp.broadcast_to(jnp.eye(length)[:, None], zero.shape)
  mask = softmax.visible(softmax.runs(None, length))
  attend = lambda key: np.asarray(
    softmax.attend(zero, zero, unit, mask, dropout=p, dropout_key=key)
  )[:, :, 0]
  whole, found = attend(None), attend(jax.random.key(0))
  seen = whole > 0
  np.testing.assert_array_equal(seen, np.tril(seen))
  kept = found != 0
  assert not (kept & ~seen).any()
  np.testing.assert_allclose(found[kept], whole[kept] / (1 - p), rtol=1e-6)
  # 19,200 weights: the standard deviation of the share is 0.003.
  assert abs(1 - kept[seen].mean() - p) < 0.013


def test_cudnn_is_for_programs_that_are_lowered_for_a_gpu(monkeypatch) -> None:
  """On a machine with a GPU, a program for the CPU runs XLA's form."""
  monkeypatch.setattr(devices, "why_not_cudnn", lambda *_: None)
  # jax looks for cuDNN when it traces a call; this is as wrong as can be seen.
  monkeypatch.setattr(softmax, "_attend_by_cudnn", lambda q, k, v: q + k - v)
  x_BTD = tokens(T)

  def run(implementation):
    config = AttentionConfig(heads=2, implementation=implementation)
    graph, params = nnx.split(_make(config))

    def call(params, x_BTD):
      return jnp.cos(nnx.merge(graph, params)(x_BTD)).sum()

    return jax.jit(jax.value_and_grad(call, argnums=(0, 1)))(params, x_BTD)

  found, wanted = run(None), run("xla")
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  with pytest.raises(NotImplementedError, match="NVIDIA GPU.*lowered for cpu"):
    run("cudnn")


def test_dropout_needs_a_key_and_no_cudnn() -> None:
  mixer, plain = _make(AttentionConfig(dropout=0.5)), _make(AttentionConfig())
  x_BTD, key = tokens(), jax.random.key(1)
  assert (mixer(x_BTD) == plain(x_BTD)).all()
  assert (plain(x_BTD, dropout_key=key) == plain(x_BTD)).all()
  assert (mixer(x_BTD, dropout_key=key) != plain(x_BTD)).any()
  for dropout in (-0.1, 1.0, float("nan")):
    with pytest.raises(ValueError, match=r"dropout=.*expected a number in"):
      AttentionConfig(dropout=dropout)
  with pytest.raises(ValueError, match="implementation='cudnn'"):
    AttentionConfig(dropout=0.1, implementation="cudnn")


@pytest.mark.parametrize("width", [8, 24, 64])
def test_parameter_counts_are_the_formulas(width) -> None:
  D, L = width, 20
  count = lambda config: parameter_count(_make(config, D))
  assert count(AttentionConfig()) == 4 * D**2 + 4 * D
  assert count(AttentionConfig(heads=2, use_bias=False)) == 4 * D**2 + D
  assert count(HyenaConfig(length=L)) == 4 * D**2 + 81 * D + 3 * L + 8640


@pytest.mark.parametrize(
  "config",
  [AttentionConfig(), HyenaConfig(length=8)],
  ids=["attention", "hyena"],
)
def test_the_output_starts_smaller_in_deep_models(config) -> None:
  spread = lambda layers: float(
    _make(config, 64, layers=layers).out_proj.kernel[...].std()
  )
  # 4,096 samples know their deviation to 1.1 %.
  assert spread(2) == pytest.approx(0.01, rel=0.05)
  assert spread(18) == pytest.approx(0.02 / 6, rel=0.05)


@pytest.mark.parametrize(
  ("make_it", "words"),
  [
    (lambda: AttentionConfig(heads=0), ["heads=0", "≥ 1"]),
    (lambda: AttentionConfig(length=0), ["length=0", "≥ 1"]),
    (lambda: AttentionConfig(implementation="gpu"), ["'gpu'", "cudnn"]),
    (lambda: _make(AttentionConfig(heads=3)), ["heads=3", "width 8"]),
    (lambda: _make(AttentionConfig(heads=8, rotary=True)), ["rotary", "even"]),
    (lambda: HyenaConfig(length=0), ["length=0", "≥ 1"]),
    (lambda: _make(HyenaConfig()), ["Hyena", "HyenaConfig.length"]),
    (
      lambda: _make(AttentionConfig()).init_state(1),
      ["AttentionConfig.length", "ModelConfig.positions"],
    ),
    (
      lambda: make("hyena").mixer(jnp.zeros((B, T + 1, D))),
      ["13 tokens", "12 lags"],
    ),
  ],
)
def test_a_wrong_value_is_named(make_it, words) -> None:
  with pytest.raises(ValueError) as error:
    make_it()
  for word in words:
    assert word in str(error.value)


def test_hyena_refuses_documents() -> None:
  mixer = make("hyena").mixer
  for call in (
    lambda: mixer(tokens(), segment_ids=_IDS_BT),
    lambda: mixer.prefill(tokens(), mixer.init_state(B), segment_ids=_IDS_BT),
  ):
    with pytest.raises(NotImplementedError, match="Hyena.*segment_ids"):
      call()


def test_cudnn_by_name_runs_or_says_why_not() -> None:
  mixer = _make(AttentionConfig(implementation="cudnn"))
  with pytest.raises(NotImplementedError, match="segment_ids"):
    mixer(tokens(), segment_ids=_IDS_BT)
  # float32 on a GPU, no GPU elsewhere.
  with pytest.raises(NotImplementedError, match="needs"):
    mixer(tokens())


@pytest.mark.parametrize("name", ["attention", "hyena"])
def test_a_token_past_the_state_has_nan(name) -> None:
  subject = make(name)
  room = subject.mixer.length
  rng = np.random.default_rng(3)
  x_BTD = rng.normal(size=(B, room + 2, D)).astype(np.float32)
  ys, state = subject.steps(x_BTD, subject.zero)
  assert np.isfinite(ys[:, :room]).all()
  assert np.isnan(ys[:, room:]).all()
  # The same in one call, from a state with room for half of its tokens.
  start = room - T // 2
  _, before = subject.steps(x_BTD[:, :start], subject.zero)
  part_BTD = x_BTD[:, start:][:, :T]
  y_BTD, after = subject.prefill(part_BTD, before)
  np.testing.assert_array_equal(np.isnan(y_BTD), np.isnan(ys[:, start:]))
  if name == "attention":  # slots keep what they have, positions count on
    for x, y in zip(after, state, strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_the_key_bias_does_not_count() -> None:
  """A key bias adds the same to all scores of a row, which softmax ignores."""
  (grads, _), _ = make("attention").gradients(tokens(), tokens(13))
  q, k, v = np.split(np.abs(nnx.to_pure_dict(grads)["qkv"]["bias"]), 3)
  assert k.max() < 1e-5 * min(q.max(), v.max())


def test_a_cache_takes_memory_by_its_length() -> None:
  bytes_of = lambda tokens: 2 * 4 * D * tokens + 4
  assert make("attention").mixer.state_size(1000) == bytes_of(14)
  assert _make(AttentionConfig(), length=30).state_size(1000) == bytes_of(30)
  # Without a configured cache: the size that a row of so many tokens needs.
  assert _make(AttentionConfig()).state_size(1000) == bytes_of(1000)


def test_attention_weights_are_those_of_the_output() -> None:
  mixer = make("attention-rotary").mixer
  a_BHTT = mixer.attention_matrix(tokens())
  np.testing.assert_allclose(a_BHTT.sum(axis=-1), 1, rtol=1e-6)
  _, _, v_BTHF = mixer._project(tokens(), jnp.arange(T)[None])
  o_BTHF = jnp.einsum("bhts,bshf->bthf", a_BHTT, v_BTHF)
  y_BTD = mixer.out_proj(o_BTHF.reshape(B, T, D))
  np.testing.assert_allclose(y_BTD, mixer(tokens()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pairs", [1, 2])
def test_a_model_of_both_decodes_as_it_reads(pairs) -> None:
  """Hyena's filter differs from pair to pair; states must not mix them up."""
  config = ModelConfig(
    HyenaConfig(filter_width=4), AttentionConfig(heads=2), 17, D, pairs, T
  )
  graph, moved = model_cases.make(config)
  model = nnx.merge(graph, moved)
  rng = np.random.default_rng(2)
  tokens_BT = rng.integers(17, size=(B, T), dtype=np.int32)
  run = lambda call: jax.jit(
    lambda params, *args: call(nnx.merge(graph, params), *args)
  )
  logits_BTV = np.asarray(run(LM.__call__)(moved, tokens_BT))
  found, state = run(LM.prefill)(moved, tokens_BT[:, :5], model.init_state(B))
  step = run(LM.step)
  for t in range(5, T):
    np.testing.assert_allclose(
      found, logits_BTV[:, t - 1], rtol=1e-4, atol=1e-4
    )
    found, state = step(moved, tokens_BT[:, t], state)
  held = sum(x.nbytes for x in jax.tree.leaves(state)) // B
  assert model.state_size(T) == held


def test_the_dataclass_defaults_are_the_papers() -> None:
  assert dataclasses.astuple(AttentionConfig()) == _ATTENTION
  assert dataclasses.astuple(HyenaConfig()) == (None, 3, 64)


def test_modules_work_alone() -> None:
  x_BTD = tokens()
  for mixer in (
    Attention(D, AttentionConfig(heads=2), rngs=nnx.Rngs(0)),
    Hyena(D, HyenaConfig(length=T), rngs=nnx.Rngs(0)),
  ):
    y_BTD = mixer(x_BTD)
    assert y_BTD.shape == (B, T, D) and np.isfinite(y_BTD).all()


def test_hyena_of_rows_shorter_than_its_filter() -> None:
  """The filter's lags beyond the row have no part in it."""
  config = HyenaConfig(length=T + 9, filter_width=4)
  mixer = _make(config)
  for layer in mixer.filter.layers:
    layer.kernel[...] *= 30  # at first the filter is too small to be seen
  params = mixer_equations.parameters(mixer)
  found_BTD = np.asarray(mixer(tokens()))
  for x_TD, y_TD in zip(tokens(), found_BTD, strict=True):
    wanted_TD = mixer_equations.hyena(config, params, np.float64(x_TD))
    # float32 Fourier transforms of values of size 1.
    np.testing.assert_allclose(y_TD, wanted_TD, rtol=2e-5, atol=2e-5)
