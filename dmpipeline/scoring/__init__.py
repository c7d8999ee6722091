"""How good datamodels are: LDS with its noise ceiling, other estimates, learning curves."""
