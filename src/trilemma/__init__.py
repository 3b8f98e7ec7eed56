"""Trilemma: ship language models within limits. The public API, loaded lazily."""
