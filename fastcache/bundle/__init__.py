"""The folder on disk where building and running meet, and the values that describe it."""
