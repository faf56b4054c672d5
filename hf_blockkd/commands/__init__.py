"""What people call from a shell."""
