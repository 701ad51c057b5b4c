"""Checks of config values: a wrong one is named with what was expected."""


def require(ok: bool, field: str, value: object, expected: str) -> None:
  """Raise a ValueError that names the field and its value unless `ok`.

  Args:
    ok: whether the value is acceptable.
    field: the name of the field, as a user writes it.
    value: the value of the field.
    expected: what the value should have been, as the end of a sentence.

  Raises:
    ValueError: `ok` is false.
  """
  if not ok:
    raise ValueError(f"{field}={value!r}: expected {expected}")
