"""From weights in few bits to a .pt2 file that stores them so, and decodes them at every call by torch's operators."""
