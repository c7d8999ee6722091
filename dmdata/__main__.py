"""``python -m dmdata`` is the ``dmdata`` command."""

from dmdata.cli import main

main()
