"""Train the mixer of moving_average.py, and load the trained model back.

The run folder stores its config as `moving_average:MovingAverageConfig`, so the
module must be importable: here it lies beside this script.
"""

import dataclasses

import jax
from moving_average import MovingAverageConfig

import rebased_jax
import train


def main() -> None:
  config = train.make_presets()["mqar"]
  config = dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, second=MovingAverageConfig()),
    steps=120,
    eval_every=120,
    save_every=60,
    log_every=40,
  )
  outcome = train.run(config, "runs/custom")
  print("stopped at step", outcome.step)

  model = rebased_jax.load("runs/custom")
  prompt = jax.numpy.arange(8)[None]
  print("next tokens:", rebased_jax.generate(model, prompt, steps=4))


if __name__ == "__main__":
  main()
