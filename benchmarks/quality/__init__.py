"""What `benchmarks/quality_per_byte.py` and `benchmarks/weights_alone.py` are made of, one job a file."""
