"""Held-out evaluation of published versions, beside training."""
