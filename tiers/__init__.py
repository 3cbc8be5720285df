"""Places where bytes live, and how they get from one to another."""
