"""The parameters that the paper counts (arXiv 2402.10644, Tables 4 and 9)."""

TABLE_4 = {  # at widths 64, 128, 256 and 512
  "attention": (623_744, 1_313_024, 2_888_192, 6_824_960),
  "conv-attention": (578_752, 1_149_312, 2_462_464, 5_580_288),
  "rwkv": (623_872, 1_313_280, 2_888_704, 6_825_984),
  "conv-rwkv": (677_120, 1_395_200, 2_561_024, 5_777_408),
  "mamba": (655_360, 1_413_120, 3_235_840, 7_847_936),
  "based": (577_984, 1_179_520, 2_459_392, 5_307_904),
  "rebased": (578_752, 1_180_288, 2_460_160, 5_308_672),
}
TABLE_9 = {
  "attention": 126_807_552,
  "based": 156_955_392,
  "rebased": 156_992_256,
}
#: Parameters by the name that `rebased inspect` knows.
PARAMETERS = {
  **{
    f"table-4-{name}-{width}": count
    for name, counts in TABLE_4.items()
    for width, count in zip((64, 128, 256, 512), counts, strict=True)
  },
  **{f"table-9-{name}": count for name, count in TABLE_9.items()},
}
