"""Strict promotion and eight CPU devices for every test."""

import os

os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    # Eight devices on two busy cores wait for each other longer than 40 s.
    "--xla_cpu_collective_call_terminate_timeout_seconds=300",
  ]
)
os.environ.setdefault("MPLBACKEND", "agg")

import jax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
