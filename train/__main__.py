"""`python -m train`, the same as `rebased`."""

from train.cli import main

main()
