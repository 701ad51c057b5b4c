"""Named sizes of calls, one list for tests and benchmarks."""

import dataclasses

import jax
from jax import ShapeDtypeStruct
import jax.numpy as jnp

from pallas_kernels.polynomial.coefficients import BASED, REBASED, Coefficients


@dataclasses.dataclass(frozen=True)
class ArgSpec:
  """The sizes of one call: q and k are (B, T, H, F), v is (B, T, H, P).

  Attributes:
    name: the name of the case in tests and benchmark results.
    B: rows of the batch.
    T: tokens of a row.
    H: heads.
    F: width of a head's queries and keys.
    P: width of a head's values.
    coefficients: the coefficients of the similarity.
    source: the paper that the sizes are from.
  """

  name: str
  B: int
  T: int
  H: int
  F: int
  P: int
  coefficients: Coefficients = REBASED
  source: str = "arXiv 2402.10644"

  def arrays(
    self, dtype: jax.typing.DTypeLike = jnp.bfloat16
  ) -> tuple[ShapeDtypeStruct, ShapeDtypeStruct, ShapeDtypeStruct]:
    """Return the shapes of q, k and v."""
    qk = ShapeDtypeStruct((self.B, self.T, self.H, self.F), dtype)
    v = ShapeDtypeStruct((self.B, self.T, self.H, self.P), dtype)
    return qk, qk, v


SPECS: tuple[ArgSpec, ...] = (
  ArgSpec("lm-1k", B=64, T=1024, H=12, F=16, P=64),
  ArgSpec("lm-4k", B=16, T=4096, H=12, F=16, P=64),
  ArgSpec("lm-32k", B=2, T=32768, H=12, F=16, P=64),
  ArgSpec("lm-64k", B=1, T=65536, H=12, F=16, P=64),
  ArgSpec("mqar-64", B=512, T=256, H=12, F=16, P=5),
  ArgSpec("mqar-512", B=64, T=512, H=12, F=16, P=42),
  ArgSpec("pile-157m", B=8, T=4096, H=64, F=16, P=12),
  ArgSpec(
    "based-360m",
    B=8,
    T=2048,
    H=16,
    F=16,
    P=64,
    coefficients=BASED,
    source="arXiv 2402.18668",
  ),
  ArgSpec("wide-32", B=8, T=4096, H=8, F=32, P=64),
  ArgSpec("wide-64", B=8, T=4096, H=16, F=64, P=48),
)
