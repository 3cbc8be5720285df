"""What will be needed next, and what to drop: pure policies, without torch and without I/O."""
