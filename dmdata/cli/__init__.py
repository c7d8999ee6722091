"""The ``dmdata`` command."""

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; the modules it needs are imported as it starts."""
    from dmdata.cli.command import main

    main(arguments)
