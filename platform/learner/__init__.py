"""The learner: batches in, weight versions out. role.py is the loop; train.py is one step of it."""
