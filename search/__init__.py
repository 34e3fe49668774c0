"""What explores: drivers that turn a lease into engine requests and their completions into one group."""
