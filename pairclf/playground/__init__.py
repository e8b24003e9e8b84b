"""`pairclf try`: a local page on which a judge scores texts that are typed or loaded."""
