"""Making students: smaller programs out of a teacher's own layers, or of the catalogue in a teacher's place."""
