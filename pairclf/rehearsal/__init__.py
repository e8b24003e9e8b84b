"""`rehearse`: run a package offline under Kaggle's mounts, limits and clock, with injected faults, and check it."""
