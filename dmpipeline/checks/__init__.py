"""Whether what a run stores is what its spec says."""
