"""What is trained: recipes, networks, augmentation, a user's own code, and the outputs that are kept of a model."""
