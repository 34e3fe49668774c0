"""The local launcher: starts the roles of a run, watches them, ends them in order (local.py is the main file)."""
