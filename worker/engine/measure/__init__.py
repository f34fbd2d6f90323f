"""Measuring programs: size, MACs, latency, memory, quality, equivalence, verdict."""
