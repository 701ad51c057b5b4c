"""The files that a run writes: config, metrics, pictures, traces."""
