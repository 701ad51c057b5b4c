"""Compute the least bytes and operations of a call, and the shares of peaks.

Bytes: each bfloat16 array is read or written once; r and dz are float32.
Operations: the matrix products of the linear form in chunks of C = 64 tokens
with E features (144 at F = 16), where a multiply and an add are 2 operations.
The full C × C products inside a chunk count. Rolls, features and the
denominator do not.

    forward            A = QKᵀ, P V              2C (F + P)
                       φ(q) S, φ(k)ᵀ v           4 E P
    backward_queries   A, do vᵀ, ds K            2C (2F + P)
                       do Sᵀ, φ(k)ᵀ v            4 E P
    backward_keys      A, do vᵀ, Pᵀ do, dsᵀ Q    2C (2F + 2P)
                       v Gᵀ, φ(k) G, φ(q)ᵀ do    6 E P
    key_state          φ(k)ᵀ v                   2 E P
    query_cotangent    φ(q)ᵀ do                  2 E P

The last two kernels run only where time is cut into slices. `least` counts the
bytes that every implementation must move: q, k, v and o in the forward pass;
q, k, v, do, o, dq, dk and dv in both passes.
"""

from pallas_kernels.polynomial.arg_specs import ArgSpec

C = 64
# Bytes per second and bfloat16 operations per second, from the data sheets.
PEAKS = {
  "NVIDIA H100 80GB HBM3": (3.35e12, 989.4e12),
  "NVIDIA H200": (4.8e12, 989.4e12),
}


def features(spec: ArgSpec) -> int:
  """Return E, the number of features, with those of c0 and c1."""
  F, c = spec.F, spec.coefficients
  return F * (F // 2 + 1) + F * (c.c1 != 0) + (c.c0 != 0)


def kernels(spec: ArgSpec) -> dict[str, tuple[int, int]]:
  """Return (bytes, operations) of each kernel."""
  F, P, EP = spec.F, spec.P, features(spec) * spec.P
  each = {
    "forward": (2 * (2 * F + 2 * P), 2 * C * (F + P) + 4 * EP),
    "backward_queries": (
      2 * (3 * F + 2 * P) + 8,
      2 * C * (2 * F + P) + 4 * EP,
    ),
    "backward_keys": (
      2 * (3 * F + 3 * P) + 8,
      2 * C * (2 * F + 2 * P) + 6 * EP,
    ),
    "key_state": (2 * (F + P), 2 * EP),
    "query_cotangent": (2 * (F + P) + 8, 2 * EP),
  }
  tokens = spec.B * spec.T * spec.H
  return {name: (a * tokens, b * tokens) for name, (a, b) in each.items()}


def least(spec: ArgSpec) -> dict[str, tuple[int, int]]:
  """Return (bytes, operations) of the forward pass and of both passes."""
  tokens, each = spec.B * spec.T * spec.H, kernels(spec)
  forward = each["forward"]
  names = ("forward", "backward_queries", "backward_keys")
  moved = 2 * tokens * (4 * spec.F + 4 * spec.P)
  return {
    "forward": forward,
    "both": (moved, sum(each[name][1] for name in names)),
  }


def shares(work: tuple[int, int], ms: float, device: str) -> dict:
  """Return the reached shares of the device's peaks, and the time at them.

  Args:
    work: (bytes, operations) of a call.
    ms: the measured time of the call.
    device: jax's name of the device; an unknown one has no shares.
  """
  moved, operations = work
  result = {"bytes": moved, "operations": operations}
  if device not in PEAKS:
    return result | {"shares": f"the peaks of {device} are not known"}
  rate, compute = PEAKS[device]
  return result | {
    "floor_ms": round(1e3 * max(moved / rate, operations / compute), 4),
    "of_dram": round(1e3 * moved / rate / ms, 3),
    "of_tensor": round(1e3 * operations / compute / ms, 3),
  }
