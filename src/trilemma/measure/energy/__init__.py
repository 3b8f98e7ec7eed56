"""Joules: by counter where there is one, by a physical formula where there is none."""
