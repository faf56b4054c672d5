"""Smaller models made of the teacher."""
