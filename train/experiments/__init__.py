"""Experiments: many runs of one model in one program, and their records."""
