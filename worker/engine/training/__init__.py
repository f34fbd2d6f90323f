"""The one training loop, its losses, and the data it reads."""
