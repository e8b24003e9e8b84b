"""Bundles, the format of a saved model: files, manifest, hashes and probe rows, read and written without torch."""
