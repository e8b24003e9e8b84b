"""`import pairclf`: judges, the workflows of a run and a scikit-learn classifier as functions and classes of Python."""
