"""The command line: wires the concrete parts together, and imports each only when its command runs."""
