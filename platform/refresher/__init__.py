"""The refresher process: role.py is the loop, labels.py labels the policy's answers, model.py trains on them."""
