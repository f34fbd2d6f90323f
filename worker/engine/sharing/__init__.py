"""Weight sharing: one-dimensional k-means, and training that moves whole clusters."""
