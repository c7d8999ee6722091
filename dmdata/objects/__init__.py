"""Where objects are and how their stores are spoken to: S3, the web, files, and whatever fsspec knows.

Errors of foreign libraries are translated into ours here, and only here.
"""
