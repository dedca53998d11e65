"""Relax passes: each takes everything through its constructor and returns a new module."""
