"""Train a model, export it, and fine-tune the export in another run."""

import dataclasses

import rebased_jax
import train


def main() -> None:
  preset = train.make_presets()["mqar"]
  config = dataclasses.replace(
    preset,
    optimizer=dataclasses.replace(preset.optimizer, warmup_steps=10),
    steps=60,
    eval_every=60,
    save_every=60,
    log_every=20,
  )
  first = train.run(config, "runs/first")

  # The same as `rebased export runs/first --out mqar_model`.
  rebased_jax.save(rebased_jax.load("runs/first"), "mqar_model")

  # The new run starts from the weights, with a new optimiser and other data. It
  # is `rebased train mqar --init-from mqar_model …`.
  tuned = dataclasses.replace(config, init_from="mqar_model", seed=1, steps=20)
  tuned = dataclasses.replace(tuned, eval_every=20)
  second = train.run(tuned, "runs/tuned")
  print("held-out loss, trained:", first.held_out["loss"])
  print("held-out loss, fine-tuned:", second.held_out["loss"])
  assert second.held_out["loss"] < first.held_out["loss"] + 0.1


if __name__ == "__main__":
  main()
