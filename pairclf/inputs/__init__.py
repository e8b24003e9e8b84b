"""From texts to tokens: truncation, templates, tokenisation, the token cache and the plan of batches. No torch here."""
