"""The techniques, one file per kind."""
