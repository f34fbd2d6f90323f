"""Programs for plain state dicts: architectures written as torch modules under the names of their common sources."""
