"""Packaging: from bundles to a folder that Kaggle runs offline, and its rehearsal."""
