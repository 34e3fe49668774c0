"""Scores of models. The scorer processes: role.py loads the models, service.py is the loop, desk.py and served.py its
parts. Who asks: shown.py (what a model is shown), asking.py (the processes), local.py (models in the asker's own
process), groups.py (scores into groups, all of some at once).
"""
