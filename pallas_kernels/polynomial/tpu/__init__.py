"""Polynomial attention on TPUs, as Pallas Mosaic TPU kernels.

`passes.py` is what `operator.py` calls; `forward.py` and `backward.py` have the
kernels; `call.py` says how their arrays lie, `sizes.py` how they are cut.
"""
