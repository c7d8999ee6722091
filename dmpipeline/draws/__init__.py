"""Randomness by counter: (seed, index) to masks, initialisation, order and augmentation."""
