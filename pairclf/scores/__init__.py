"""Metrics, probabilities and temperatures over `(N, C)` arrays. No torch here."""
