"""Scripts that measure speed and memory; benchmarks/README.md lists them."""
