"""Checks that documents of a packed row do not reach each other."""

import jax
import numpy as np
from polynomial_oracle import Answer, Inputs


def spoil(x: Inputs, field: str, token: int, how: str) -> Inputs:
  """Put an "inf" or "nan" into one number, or give a token "other" values."""
  y = getattr(x, field).copy()
  if how == "other":
    y[:, token] = -3 * y[:, token] + 1
  else:
    y[0, token, 0, 1] = {"inf": np.inf, "nan": np.nan}[how]
  return x._replace(**{field: y})


def assert_bit_identical(a, b) -> None:
  """Assert that two trees are bit-identical."""
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def assert_others_identical(
  got: Answer, clean: Answer, document: slice, names: tuple[str, ...]
) -> None:
  """Assert that the tokens of all other documents are bit-identical."""
  for name in names:
    a, b = np.asarray(getattr(got, name)), np.asarray(getattr(clean, name))
    for others in (slice(None, document.start), slice(document.stop, None)):
      assert_bit_identical(a[:, others], b[:, others])


def not_finite(x_BTHX, tokens: slice) -> bool:
  """Whether each of these tokens of row 0, head 0 has an Inf or NaN."""
  x = np.asarray(x_BTHX, np.float32)[0, tokens, 0]
  return bool((~np.isfinite(x)).any(axis=-1).all())


def assert_spoilt(got: Answer, field: str, document: slice, token: int) -> None:
  """Assert that what depends on a spoilt number is not finite.

  An Inf or NaN must not be hidden by a zero within its own document.
  """
  later = slice(token, document.stop)
  earlier = slice(document.start, token + 1)
  only = slice(token, token + 1)
  depends = {
    "q_BTHF": [("o", only), ("dq", only), ("dk", earlier), ("dv", earlier)],
    "k_BTHF": [("o", later), ("dq", later), ("dk", only)],
    "v_BTHP": [("o", later), ("dq", later), ("dk", earlier)],
    "do_BTHP": [("dq", only), ("dk", earlier), ("dv", earlier)],
  }[field]
  for name, tokens in depends:
    assert not_finite(getattr(got, name), tokens), (name, tokens)
