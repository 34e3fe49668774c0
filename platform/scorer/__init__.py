"""The scorer processes: role.py loads the models, service.py is the loop, desk.py and served.py its parts."""
