"""Removing channels soundly: finding dependency groups, adapting the graph, proving the result."""
