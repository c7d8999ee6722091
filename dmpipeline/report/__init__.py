"""The self-contained page of a run, and its figures."""
