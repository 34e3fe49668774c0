"""What a score is: named components of an answer, and the weighted sum of them. Processes and deadlines are
platform/verifier's.
"""
