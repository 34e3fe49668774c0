"""The model that version 0 comes from: runs/NAME/start, a link to a Hugging Face directory.

``model.path`` names it; without one the small model of ``model=tiny`` is made and cold-started (job=sft) once, kept in
the cache, and found there by every later run of the same model, task and sft settings. No torch here: the cold start
runs in a process of its own.
"""

from __future__ import annotations
