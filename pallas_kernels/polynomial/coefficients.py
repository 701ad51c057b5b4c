"""The coefficients of a similarity: sim = c0 + c1·s + c2·s²."""

import dataclasses

from pallas_kernels.arguments import number


@dataclasses.dataclass(frozen=True)
class Coefficients:
  """The coefficients of sim = c0 + c1·s + c2·s², as static Python numbers.

  NumPy scalars and jax arrays of one number become Python numbers.

  Attributes:
    c0: coefficient of the constant term.
    c1: coefficient of s.
    c2: coefficient of s².

  Raises:
    ValueError: a coefficient is no finite number, or all three are 0.
  """

  c0: float
  c1: float
  c2: float

  def __post_init__(self) -> None:
    for name in ("c0", "c1", "c2"):
      value = number(f"Coefficients.{name}", getattr(self, name))
      object.__setattr__(self, name, value)  # the dataclass is frozen
    if self.c0 == self.c1 == self.c2 == 0:
      raise ValueError(
        "Coefficients: all three are 0, so every similarity is 0; "
        "expected at least one other than 0"
      )

  def scaled(self, scale: float) -> "Coefficients":
    """Return coefficients that take q·k in the place of s = scale · q·k."""
    return Coefficients(self.c0, self.c1 * scale, self.c2 * scale * scale)

  @property
  def affine(self) -> bool:
    """Whether the polynomial has a constant or a linear term."""
    return self.c0 != 0 or self.c1 != 0


#: ReBased (arXiv 2402.10644): sim = s².
REBASED = Coefficients(0.0, 0.0, 1.0)
#: Based (arXiv 2402.18668): the Taylor expansion of exp(s) to second order.
BASED = Coefficients(1.0, 1.0, 0.5)
