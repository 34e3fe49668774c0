"""Starts the roles of a run, watches, restarts and ends them: run.py is the loop, jobs.py what each job does."""
