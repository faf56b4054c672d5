"""Runs that survive what interrupts them."""
