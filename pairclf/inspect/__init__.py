"""The commands that inspect data, inputs and the machine: `check`, `show`, `lengths`, `doctor`. They change nothing."""
