"""Tests of every mixer's error messages: shapes, dtypes, sizes, configs."""

import dataclasses
import re

from flax import nnx
import jax
import jax.numpy as jnp
from mixer_registry import MIXERS, ONE_OF_EACH
from mixer_subject import B, D, T, make, tokens
import numpy as np
import pytest

from rebased_jax import LM, Mixer, MixerConfig, ModelConfig, Site

each_mixer = pytest.mark.parametrize("name", ONE_OF_EACH)
_IDS_BT = np.zeros((B, T), np.int32)


def refuses(call, *words: str) -> None:
  with pytest.raises(ValueError) as error:
    call()
  for word in words:
    assert word in str(error.value)


@each_mixer
@pytest.mark.parametrize(
  "shape", [(B, 0, D), (0, T, D), (B, T, D - 1), (T, D), (1, B, T, D)], ids=str
)
def test_rows_of_a_wrong_shape(name, shape) -> None:
  mixer = make(name).mixer
  words = type(mixer).__name__, f"x has shape {shape}", "(B, T, D)", f"D = {D}"
  x_BTD = np.zeros(shape, np.float32)
  refuses(lambda: mixer(x_BTD), *words)
  refuses(lambda: mixer.prefill(x_BTD, mixer.init_state(B)), *words)


@each_mixer
@pytest.mark.parametrize(
  "shape", [(B, D - 1), (0, D), (D,), (B, 1, D)], ids=str
)
def test_a_token_of_a_wrong_shape(name, shape) -> None:
  mixer = make(name).mixer
  refuses(
    lambda: mixer.step(np.zeros(shape, np.float32), mixer.init_state(B)),
    type(mixer).__name__,
    f"x has shape {shape}",
    "(B, D)",
  )


@each_mixer
def test_a_state_of_other_rows(name) -> None:
  mixer = make(name).mixer
  state = mixer.init_state(B + 1)
  words = type(mixer).__name__, "state has shape", f"{B} rows"
  refuses(lambda: mixer.prefill(tokens(), state), *words)
  refuses(lambda: mixer.step(tokens()[:, 0], state), *words)


@each_mixer
def test_integers_where_floats_belong(name) -> None:
  mixer = make(name).mixer
  refuses(lambda: mixer(tokens().astype(np.int32)), "x is int32", "floats")


@pytest.mark.parametrize(
  "name", [name for name in ONE_OF_EACH if MIXERS[name].takes_documents]
)
@pytest.mark.parametrize(
  ("ids_BT", "words"),
  [
    (_IDS_BT[:, 1:], f"segment_ids has shape {(B, T - 1)}"),
    (_IDS_BT[0], f"segment_ids has shape {(T,)}"),
    (_IDS_BT.astype(np.float32), "segment_ids has dtype float32"),
  ],
)
def test_wrong_segment_ids(name, ids_BT, words) -> None:
  mixer = make(name).mixer
  state = mixer.init_state(B)
  refuses(lambda: mixer(tokens(), segment_ids=ids_BT), words)
  refuses(lambda: mixer.prefill(tokens(), state, segment_ids=ids_BT), words)


@each_mixer
@pytest.mark.parametrize(
  ("positions_BM", "words"),
  [
    (_IDS_BT[:, :0], f"query_positions has shape {(B, 0)}"),
    (_IDS_BT[:1], f"query_positions has shape {(1, T)}"),
    (_IDS_BT[0], f"query_positions has shape {(T,)}"),
    (_IDS_BT.astype(np.float32), "query_positions has dtype float32"),
  ],
)
def test_wrong_query_positions(name, positions_BM, words) -> None:
  mixer = make(name).mixer
  refuses(lambda: mixer(tokens(), query_positions=positions_BM), words)


@each_mixer
def test_a_position_outside_the_row_has_nan(name) -> None:
  positions_BM = np.array([[0, T], [-1, T - 1]], np.int32)
  _, y_BMD = make(name).gradients(
    tokens(), np.ones((B, 2, D), np.float32), None, positions_BM
  )
  spoilt_BM = np.isnan(y_BMD).all(axis=-1)
  np.testing.assert_array_equal(spoilt_BM, [[False, True], [True, False]])
  assert np.isfinite(y_BMD[~spoilt_BM]).all()


@each_mixer
def test_a_dtype_that_nothing_computes_in(name) -> None:
  for dtype in ("int8", "float8_e4m3fn", "float"):
    with pytest.raises(ValueError, match=f"dtype='{dtype}'.*bfloat16"):
      _directly(name, dtype)
  with pytest.raises(ValueError, match="'float64'.*jax_enable_x64"):
    _directly(name, "float64")


def _directly(name: str, dtype: str) -> Mixer:
  """Make the mixer without a `Site`, which checks dtypes too."""
  entry = MIXERS[name]
  return entry.mixer_class(D, entry.config, dtype=dtype, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"width": 0}, "Site.width=0: expected an integer ≥ 1"),
    ({"width": 8.0}, "Site.width=8.0: expected an integer ≥ 1"),
    ({"layers": 0}, "Site.layers=0"),
    ({"layer": 1}, "Site.layer=1: expected 0 to 0"),
    ({"layer": -1}, "Site.layer=-1: expected 0 to 0"),
    ({"length": 0}, "Site.length=0"),
    ({"dtype": "half"}, "dtype='half'"),
  ],
)
def test_a_wrong_site(fields, words) -> None:
  with pytest.raises(ValueError, match=re.escape(words)):
    Site(**{"width": D, **fields})


@each_mixer
@pytest.mark.parametrize("width", [1, 7])
def test_a_width_that_nothing_divides(name, width) -> None:
  """One token and two; heads of Based and ReBased are floor(D / H) wide."""
  config = MIXERS[name].config
  if hasattr(config, "heads"):
    config = type(config)(heads=1)

  @jax.jit
  def run():
    mixer = config.make(Site(width, length=T), rngs=nnx.Rngs(0))
    return [mixer(jnp.ones((B, count, width))) for count in (1, 2)]

  y_B1D, y_B2D = jax.device_get(run())
  np.testing.assert_allclose(y_B1D, y_B2D[:, :1], rtol=1e-5, atol=1e-6)
  assert y_B2D.shape == (B, 2, width) and np.isfinite(y_B2D).all()


@each_mixer
@pytest.mark.parametrize("width", [0, -4, 2.5, True, "8"], ids=str)
def test_a_wrong_width(name, width) -> None:
  entry = MIXERS[name]
  refuses(
    lambda: entry.mixer_class(width, entry.config, rngs=nnx.Rngs(0)),
    f"width={width!r}",
    "≥ 1",
  )


@each_mixer
def test_another_mixers_config(name) -> None:
  other = MIXERS["conv" if name != "conv" else "rwkv"].config
  expected = type(MIXERS[name].config).__name__
  refuses(
    lambda: MIXERS[name].mixer_class(D, other, rngs=nnx.Rngs(0)),
    f"config is a {type(other).__name__}: expected a {expected}",
  )


# Mistakes in a mixer that a user wrote.


@dataclasses.dataclass(frozen=True)
class SumConfig(MixerConfig):
  """A running sum with a mistake."""

  #: What `_prefill` returns wrongly, or what `make` does. None: no mistake.
  mistake: str | None = None

  def make(self, site: Site, *, rngs: nnx.Rngs) -> Mixer:
    del rngs
    if self.mistake == "make":
      return None
    return Sum(site.width, self)


class Sum(Mixer):
  """The sum of the tokens so far."""

  config_type = SumConfig

  def __init__(self, width: int, config: SumConfig):
    if config.mistake != "no super":
      super().__init__(width, config)
    self.mistake = config.mistake

  def init_state(self, batch):
    return {"sum": jnp.zeros((batch, self.width))}

  def _prefill(self, x_BTD, state, *, segment_ids, axes):
    del segment_ids, axes
    y_BTD = state["sum"][:, None] + jnp.cumsum(x_BTD, axis=1)
    last_BD = y_BTD[:, -1]
    good = {"sum": last_BD}
    returns = {
      None: (y_BTD, good),
      "few tokens": (y_BTD[:, :-1], good),
      "width": (y_BTD[..., :-1], good),
      "no state": y_BTD,
      "three": (y_BTD, good, None),
      "structure": (y_BTD, (last_BD,)),
      "shape": (y_BTD, {"sum": last_BD[:, :-1]}),
      "dtype": (y_BTD, {"sum": last_BD.astype(jnp.bfloat16)}),
    }
    return returns[self.mistake]


def _sum(mistake: str | None) -> Mixer:
  return Sum(D, SumConfig(mistake))


@pytest.mark.parametrize(
  ("mistake", "error", "words"),
  [
    ("few tokens", ValueError, f"y of shape {(B, T - 1, D)}: expected"),
    ("width", ValueError, f"y of shape {(B, T, D - 1)}: expected"),
    ("no state", TypeError, ": expected (y, state)"),
    ("three", TypeError, "3 values: expected (y, state)"),
    ("structure", ValueError, "expected that of init_state, PyTreeDef"),
    ("shape", ValueError, f"float32[{B}, {D - 1}]: expected float32[{B}, {D}]"),
    ("dtype", ValueError, f"bfloat16[{B}, {D}]: expected float32[{B}, {D}]"),
  ],
)
def test_a_prefill_that_returns_something_else(mistake, error, words) -> None:
  mixer, x_BTD = _sum(mistake), tokens()
  words = f"Sum._prefill returned .*{re.escape(words)}"
  positions_BM = np.full((B, 2), T - 1)
  calls = (
    lambda: mixer(x_BTD),
    lambda: mixer(x_BTD, query_positions=positions_BM),
    lambda: mixer.prefill(x_BTD, mixer.init_state(B)),
    lambda: jax.eval_shape(lambda x: mixer(x), x_BTD),
  )
  for call in calls:
    with pytest.raises(error, match=words):
      call()


@pytest.mark.parametrize("mistake", ["few tokens", "shape", "no state"])
def test_a_step_from_a_wrong_prefill(mistake) -> None:
  mixer = _sum(mistake)
  with pytest.raises((ValueError, TypeError), match="Sum._prefill returned"):
    mixer.step(tokens()[:, 0], mixer.init_state(B))


def test_a_prefill_without_a_mistake() -> None:
  mixer, x_BTD = _sum(None), tokens()
  y_BTD, state = mixer.prefill(x_BTD, mixer.init_state(B))
  np.testing.assert_array_equal(y_BTD, mixer(x_BTD))
  y_BD, _ = mixer.step(x_BTD[:, 0], state)
  np.testing.assert_array_equal(y_BD, state["sum"] + x_BTD[:, 0])


def test_a_faster_mix_and_step_that_return_something_else(monkeypatch) -> None:
  mixer, x_BTD = _sum(None), tokens()
  zero = mixer.init_state(B)
  monkeypatch.setattr(Sum, "_mix", lambda self, x, **how: x[:, 1:])
  refuses(lambda: mixer(x_BTD), "Sum._mix returned y", f"{(B, T - 1, D)}")
  refuses(
    lambda: mixer(x_BTD, query_positions=np.zeros((B, 2), np.int32)),
    f"Sum._mix returned y of shape {(B, T - 1, D)}: expected {(B, 2, D)}",
  )
  monkeypatch.setattr(Sum, "_step", lambda self, x, state: (x[None], state))
  refuses(lambda: mixer.step(x_BTD[:, 0], zero), "Sum._step", f"{(1, B, D)}")
  monkeypatch.setattr(Sum, "_step", lambda self, x, state: (x, x))
  refuses(lambda: mixer.step(x_BTD[:, 0], zero), "Sum._step", "structure")
  monkeypatch.setattr(Sum, "_step", lambda self, x, state: x)
  with pytest.raises(TypeError, match="Sum._step returned"):
    mixer.step(x_BTD[:, 0], zero)


def test_a_mixer_whose_init_forgot_the_base_class() -> None:
  mixer = _sum("no super")
  with pytest.raises(AttributeError, match=r"Sum\.width .*super\(\).__init__"):
    mixer(tokens())
  with pytest.raises(AttributeError, match=r"Sum\.dtype .*super\(\).__init__"):
    _ = mixer.dtype
  with pytest.raises(AttributeError, match="no attribute 'depth'"):
    _ = mixer.depth


def test_a_mixer_without_a_config_type(monkeypatch) -> None:
  monkeypatch.delattr(Sum, "config_type")
  with pytest.raises(TypeError, match="write `config_type = SumConfig`"):
    _sum(None)


@pytest.mark.parametrize("block", ["pre-norm", "mamba"])
def test_a_config_that_makes_no_mixer(block) -> None:
  config = ModelConfig(
    first=SumConfig(),
    second=SumConfig("make"),
    vocab_size=5,
    width=D,
    block=block,
  )
  with pytest.raises(TypeError, match="SumConfig.make returned None: expected"):
    LM(config, rngs=nnx.Rngs(0))
