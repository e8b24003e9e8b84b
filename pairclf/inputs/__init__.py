"""Tokens: what the model will see of a row, and in which batches. No torch here."""
