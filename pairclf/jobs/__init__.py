"""Jobs: what a command does, from its arguments to its artefacts."""
