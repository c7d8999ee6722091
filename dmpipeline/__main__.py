"""``python -m dmpipeline`` is the ``dmpipeline`` command."""

from dmpipeline.cli import main

main()
