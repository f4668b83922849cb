"""Where a run writes: its directory, its log, its numbers and its progress lines. Imports without torch."""
