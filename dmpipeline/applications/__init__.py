"""What datamodels are for: explanations, counterfactuals, data support, similar examples, leakage and embeddings."""
