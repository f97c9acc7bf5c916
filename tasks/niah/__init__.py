"""Needles in a haystack: RULER's eight needle tasks and variable tracking."""
