"""pairclf: from preference pairs to a submission that is right and in time."""

__version__ = "0.1.0"
