"""Doors to other tools: each file is the only place that knows one of them. Nothing here is imported by the rest."""
