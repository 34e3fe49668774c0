"""Held-out evaluation of published versions, beside training; answers.py samples and verifies prompts for anybody."""
