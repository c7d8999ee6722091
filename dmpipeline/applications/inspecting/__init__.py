"""What is odd about examples: which are copies of one another, and whose label may be wrong."""
