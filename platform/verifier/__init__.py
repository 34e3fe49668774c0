"""Killable worker processes in which rule rewards are computed: pool.py is the caller's end, worker.py the process."""
