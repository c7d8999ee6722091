"""What guides a fit: scores that say which examples are likely to matter, and mixtures of fits that trust them."""
