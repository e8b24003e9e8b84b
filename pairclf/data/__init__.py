"""Tables of rows, scores and submissions: the only modules that know files, columns and formats. No torch here."""
