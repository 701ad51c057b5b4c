"""The Hopper GPU implementation of polynomial attention, in Pallas Mosaic GPU.

`docs/kernels.md` explains the kernels with a drawing, the equations in the
order of the code, and a glossary. The files, in reading order:

  passes         the five passes: what an implementation of the operator offers
  launch         the static record of a launch, the plan of a call's launches
  pipeline       the walk over chunks: two warpgroups, async copies, barriers
  forward        what the walk does with a chunk in the forward
  backward       what it does in the backward, the derivative
  feature_pairs  both, for the mixed products of F > 16
  within_chunk   F > 16: adds the chunk's own tokens to the sums of the walks
  partial_sums   F > 16: the sums that the walks hand over
  warpgroup      the records that the code of a warpgroup receives
  tiles          layouts and tensor-core products
  features       the feature blocks of queries and keys, and their derivatives
  documents      rows of several documents
  time_slices    the states at the boundaries of slices of time
  states         conversion from and to the public `State`

This package imports Mosaic GPU, which jax has since 0.11. The rest of
`pallas_kernels` imports it only where these kernels run.
"""
