"""Report on the training step for devices that are not attached."""
