"""What fits two models together."""
