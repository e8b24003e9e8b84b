"""Turn texts into tokens: truncation, templates, tokenisation, the token cache and the plan of batches; no torch."""
