"""Published systems: one file for the names, the quirks and the checkpoints of each."""
