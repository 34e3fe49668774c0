"""What compares runs: intervals and tests over seeds and questions."""
