"""Softmax cross-entropy of a tied head, without whole logits: `cross_entropy`.

`operator.py` has the public function and its derivative, `xla.py` the losses of
logits in XLA, `gpu.py` the Hopper kernel that makes losses and gradients of
logits.
"""

from pallas_kernels.cross_entropy.operator import cross_entropy as cross_entropy
from pallas_kernels.cross_entropy.xla import TokenLosses as TokenLosses

__all__ = ["TokenLosses", "cross_entropy"]
