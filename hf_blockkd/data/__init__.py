"""Rows on their way into a run."""
