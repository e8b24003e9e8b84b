"""Prediction under a deadline: planner, worker pool, journal, submission; forecast, inference server, verification."""
