"""The commands of `pare`, one file per noun."""
