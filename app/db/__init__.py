"""The database edge: tables, engine, sessions."""
