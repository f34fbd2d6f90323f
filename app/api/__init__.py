"""The HTTP edge: thin routers, one file per noun; each calls a use case in one transaction and shows the row."""
