"""`report`: one HTML file about runs: their figures, what is doubtful about them, and rows to look at."""
