"""Weights in few bits: what they stand in, and the file that stores them in as few bytes."""
