"""Publishing: a package that was rehearsed to Kaggle, its submission, and the ledger."""
