"""What a score is: pure functions of (problem, text). Processes and deadlines are platform/generator's."""
