"""`push`, `submit` and `ledger`: upload a rehearsed package to Kaggle, submit it, and record the scores."""
