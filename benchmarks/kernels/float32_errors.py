"""Compare ways to multiply float32 operands on a tensor core, by their errors.

    python benchmarks/kernels/float32_errors.py

Computes the forward and the derivative of ReBased as the Hopper kernels do,
chunk by chunk, in numpy on a CPU. An operand of a matrix product is a sum of
tiles of few bits. Everything else is rounded to float32. Prints a Markdown
table of ‖a − ref‖ / ‖ref‖ against the quadratic form in float64.
"""

import dataclasses

import numpy as np

T, F, P, C = 1024, 16, 64, 64
STEP = 16  # columns that a tensor core sums before it rounds
EPS = 1e-6
WEIGHTS = np.repeat(
  [1.0] + [2.0] * (F // 2 - 1) + [1.0], F
)  # of query features


@dataclasses.dataclass(frozen=True)
class Operands:
  """How an operand of a product is represented.

  Attributes:
    name: for the table.
    bits: significant bits of a tile.
    tiles: tiles that sum to the operand. Of two operands with n tiles each, the
      n (n + 1) / 2 largest products are taken.
  """

  name: str
  bits: int
  tiles: int

  def split(self, x: np.ndarray) -> list[np.ndarray]:
    """Return the tiles of x, the largest first."""
    found = []
    for _ in range(self.tiles):
      fraction, exponent = np.frexp(x)
      rounded = np.round(fraction * 2.0**self.bits)
      found.append(np.ldexp(rounded, exponent - self.bits))
      x = x - found[-1]
    return found

  def add(self, total, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return total + a b, rounded to float32 after every `STEP` columns."""
    a_tiles, b_tiles = self.split(a), self.split(b)
    for i, a_tile in enumerate(a_tiles):
      for b_tile in b_tiles[: self.tiles - i]:
        for k in range(0, a.shape[1], STEP):
          some = slice(k, k + STEP)
          total = float32(total + a_tile[:, some] @ b_tile[some])
    return total

  def multiply(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a b, as `add` sums it."""
    return self.add(0.0, a, b)


WAYS = (
  Operands("bfloat16", 8, 1),
  Operands("TF32", 11, 1),
  Operands("two bfloat16", 8, 2),
  Operands("three bfloat16", 8, 3),
  Operands("two TF32", 11, 2),
)


def float32(x: np.ndarray) -> np.ndarray:
  """Round to float32; all arrays are float64."""
  return np.asarray(x, np.float32).astype(np.float64)


def features(x: np.ndarray) -> np.ndarray:
  """Return the features of q or k, without weights."""
  rolled = [np.roll(x, -r, axis=1) for r in range(F // 2 + 1)]
  return float32(np.concatenate([x * y for y in rolled], axis=1))


def features_gradient(x, u, way: Operands) -> np.ndarray:
  """Return J(x)ᵀ u, where J is the derivative of `features`."""
  gradient = np.zeros_like(x)
  for r in range(F // 2 + 1):
    of_r = u[:, r * F : (r + 1) * F]
    back = sum(way.split(float32(of_r * x)))
    gradient = gradient + of_r * np.roll(x, -r, axis=1) + np.roll(back, r, 1)
    gradient = float32(gradient)
  return gradient


def by_chunks(q, k, v, do, way: Operands) -> dict[str, np.ndarray]:
  """Return o, dq, dk and dv of one head, computed as the kernels do."""
  o, dq, dk, dv = (np.zeros_like(x) for x in (v, q, k, v))
  r, dz = np.zeros((T, 1)), np.zeros((T, 1))
  starts = range(0, T, C)
  sees = np.tril(np.ones((C, C)))
  kv, kk = np.zeros((WEIGHTS.size, P)), np.zeros((F, F))
  for start in starts:
    t = slice(start, start + C)
    weighted = features(q[t]) * WEIGHTS
    a = way.multiply(q[t], k[t].T)
    sim, dsim = float32(sees * a * a), way.multiply(do[t], v[t].T)
    past, u = way.multiply(q[t], kk), way.multiply(do[t], kv.T)
    z = (past * q[t]).sum(1, keepdims=True) + sim.sum(1, keepdims=True)
    r[t] = float32(1 / (z + EPS))
    o[t] = float32(r[t] * way.add(way.multiply(weighted, kv), sim, v[t]))
    num = (u * weighted).sum(1, keepdims=True)
    num = float32(num + (sim * dsim).sum(1, keepdims=True))
    dz[t] = float32(-num * r[t] * r[t])
    da = float32(sees * (r[t] * dsim + dz[t]) * 2 * a)
    through_state = features_gradient(q[t], u * WEIGHTS, way)
    through_state = float32(r[t] * through_state + 2 * dz[t] * past)
    dq[t] = way.add(through_state, da, k[t])
    kv = way.add(kv, features(k[t]).T, v[t])
    kk = way.add(kk, k[t].T, k[t])
  dkv, dkk = np.zeros_like(kv), np.zeros_like(kk)
  for start in reversed(starts):
    s = slice(start, start + C)
    a, dsim = way.multiply(k[s], q[s].T), way.multiply(v[s], do[s].T)
    da = float32(sees.T * (r[s].T * dsim + dz[s].T) * 2 * a)
    sim = float32(sees.T * r[s].T * a * a)
    through_state = 2 * way.multiply(k[s], dkk)
    u = way.multiply(v[s], dkv.T)
    through_state = through_state + features_gradient(k[s], u, way)
    dk[s] = way.add(float32(through_state), da, q[s])
    dv[s] = way.add(way.multiply(features(k[s]), dkv), sim, do[s])
    weighted = float32(features(q[s]) * WEIGHTS * r[s])
    dkv = way.add(dkv, weighted.T, do[s])
    dkk = way.add(dkk, float32(q[s] * dz[s]).T, q[s])
  return dict(o=o, dq=dq, dk=dk, dv=dv)


def quadratic(q, k, v, do) -> dict[str, np.ndarray]:
  """Return o, dq, dk and dv by the quadratic form in float64."""
  a = q @ k.T
  sees = np.tril(np.ones_like(a))
  sim = sees * a * a
  r = 1 / (sim.sum(1, keepdims=True) + EPS)
  o = r * (sim @ v)
  dz = -r * (do * o).sum(1, keepdims=True)
  da = sees * (r * (do @ v.T) + dz) * 2 * a
  return dict(o=o, dq=da @ k, dk=da.T @ q, dv=(r * sim).T @ do)


def main() -> None:
  """Print the table."""
  results = ("o", "dq", "dk", "dv")
  print("| keys | operands | products |", " | ".join(results), "|")
  print("|---|---|---|", "---|" * len(results), sep="")
  for keys in ("random", "alike"):
    random = np.random.default_rng(0)
    q, k = (random.normal(size=(T, F)) for _ in range(2))
    v, do = (random.normal(size=(T, P)) for _ in range(2))
    if keys == "alike":
      k = random.normal(size=(1, F)) + 0.1 * k
    arrays = [float32(x) for x in (q, k, v, do)]
    wanted = quadratic(*arrays)
    for way in WAYS:
      found = by_chunks(*arrays, way)
      errors = [
        np.linalg.norm(found[x] - wanted[x]) / np.linalg.norm(wanted[x])
        for x in results
      ]
      products = way.tiles * (way.tiles + 1) // 2
      each = " | ".join(f"{error:.1e}" for error in errors)
      print(f"| {keys} | {way.name} | {products} | {each} |")


if __name__ == "__main__":
  main()
