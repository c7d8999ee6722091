"""Regenerate the artifacts of the datamodels release, verify them, and fit datamodels against them."""
