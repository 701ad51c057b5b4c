"""Train a preset from Python, resume it, and load the model."""

import dataclasses

import jax.numpy as jnp

import rebased_jax
import train


def main() -> None:
  # A preset is a frozen dataclass: change it with `dataclasses.replace`.
  config = train.make_presets()["mqar"]
  config = dataclasses.replace(
    config, steps=120, eval_every=120, save_every=60, log_every=40
  )
  outcome = train.run(config, "runs/example")
  print("stopped at step", outcome.step)

  # The same call resumes a run; this one has ended, so nothing is trained.
  assert train.run(config, "runs/example").step == outcome.step

  model = rebased_jax.load("runs/example")
  tokens_BT = jnp.arange(8)[None]
  print("logits:", model(tokens_BT).shape)


if __name__ == "__main__":
  main()
