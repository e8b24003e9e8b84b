"""Tables: the only rooms that know files, columns and formats. No torch here."""
