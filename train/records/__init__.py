"""What a run leaves in its folder: config, metrics, pictures, traces."""
