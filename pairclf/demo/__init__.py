"""`demo`: synthetic data, and all steps from rows to a rehearsed submission."""
