"""The rollout processes: role.py is the loop, rollout.py its parts."""
