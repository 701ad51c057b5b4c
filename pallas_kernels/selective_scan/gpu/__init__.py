"""Hopper kernels of Mamba's scan, forward and backward.

`passes.py` has the two passes that the operator calls, and says which calls
they can do. `forward.py` and `backward.py` have the kernels, `walk.py` what
both are made of.
"""
