"""The verbs of the command `rebased`, one file each; `train.cli` lists them."""
