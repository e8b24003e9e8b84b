"""Judgements over `(N, C)` arrays of probabilities and targets. No torch here."""
