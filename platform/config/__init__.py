"""The typed schema, composition of the command line, and errors that name the way out. No torch."""
