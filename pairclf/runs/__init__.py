"""The workflows of a run: train a fold, cross-validate, evaluate, pseudo-label, and start several processes."""
