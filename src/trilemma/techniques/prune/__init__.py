"""Removing weights: single ones (magnitude, Wanda), channels and heads (width), layers (depth)."""
