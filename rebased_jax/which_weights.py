"""The name of the weights that a model gets of a run."""

from typing import Literal

#: "trained": those of the last step. "ema": their average over the steps, which
#: a run with `ema` keeps.
Weights = Literal["trained", "ema"]
