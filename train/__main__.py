"""`python -m train`, the same as `rebased`."""

from train.cli import main

if __name__ == "__main__":
  main()
