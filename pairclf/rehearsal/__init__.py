"""Rehearsal: a package, run offline as Kaggle would run it, with its limits and what may go wrong."""
