"""Prediction under a deadline: what is scored next, who does it, what is known by now and what survives a kill."""
