"""Contracts shared by every room: no torch, no I/O."""
