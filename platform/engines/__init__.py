"""Engines: what makes tokens, behind the Engine protocol of core."""
