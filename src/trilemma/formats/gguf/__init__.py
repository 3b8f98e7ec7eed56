"""Weights in GGUF, both ways: blocks of GGML's simple types are our grids in groups of 32, bit for bit."""
