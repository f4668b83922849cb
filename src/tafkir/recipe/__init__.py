"""The typed recipe: its schema, and how it is read, resolved and shown. Imports without torch."""
