"""Uploaded bytes to a trainable module and back: intake check, import, export."""
