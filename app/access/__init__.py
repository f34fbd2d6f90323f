"""Who may do what, and how much of it: keys, owners, limits, the record of what was done."""
