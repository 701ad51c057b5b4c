"""Named shapes, one list for tests, tuning and benchmarks."""

import dataclasses

from jax import ShapeDtypeStruct
import jax.numpy as jnp

from pallas_kernels.polynomial.spec import BASED, REBASED, Coefficients


@dataclasses.dataclass(frozen=True)
class ArgSpec:
  """The sizes of one call, q and k (B, T, H, F) and v (B, T, H, P)."""

  name: str
  B: int
  T: int
  H: int
  F: int
  P: int
  coefficients: Coefficients = REBASED
  source: str = "arXiv 2402.10644"

  def arrays(self, dtype=jnp.bfloat16) -> tuple[ShapeDtypeStruct, ...]:
    """q, k and v."""
    qk = ShapeDtypeStruct((self.B, self.T, self.H, self.F), dtype)
    v = ShapeDtypeStruct((self.B, self.T, self.H, self.P), dtype)
    return qk, qk, v


SPECS: tuple[ArgSpec, ...] = (
  ArgSpec("lm-1k", 64, 1024, 12, 16, 64),
  ArgSpec("lm-4k", 16, 4096, 12, 16, 64),
  ArgSpec("lm-32k", 2, 32768, 12, 16, 64),
  ArgSpec("lm-64k", 1, 65536, 12, 16, 64),
  ArgSpec("mqar-64", 512, 256, 12, 16, 5),
  ArgSpec("mqar-512", 64, 512, 12, 16, 42),
  ArgSpec("pile-157m", 8, 4096, 64, 16, 12),
  ArgSpec("based-360m", 8, 2048, 16, 16, 64, BASED, "arXiv 2402.18668"),
  ArgSpec("wide-32", 8, 4096, 8, 32, 64),
  ArgSpec("wide-64", 8, 4096, 16, 64, 48),
)
