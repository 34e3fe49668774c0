"""Prompts with a verifier's answer: generated families and local sets."""
