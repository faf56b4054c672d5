"""The models between student and teacher: each stepping stone by itself, run, saved and loaded."""
