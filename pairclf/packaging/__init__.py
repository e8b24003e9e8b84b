"""`package`: build the folder for Kaggle: kernel, bundles, wheels, metadata, and the search for secrets."""
