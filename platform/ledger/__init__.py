"""The durable truth about every group, batch and version of a run (I1): one SQLite file. SQL stands nowhere else."""
