"""Data: batches as pure functions of the step."""
