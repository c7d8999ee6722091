"""Examples by the weights of their datamodels: principal directions, a map, clusters, and files of these."""
