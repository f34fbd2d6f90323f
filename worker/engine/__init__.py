"""The engine: torch code that turns a directory into a directory. It never imports web, queue, SQL or storage code."""
