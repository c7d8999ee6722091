"""A run in the release's own layout, in a folder or a bucket, with its catalog."""
