"""The ``dmdata`` command: list, describe, price, download and mirror what a catalog holds, and show what was spent.

Help, completion and an error of usage are instant: the modules of commands declare arguments and options, and import
what does the work when a command runs.
"""

from collections.abc import Sequence

import click

from dmdata.cli import artifact_commands, catalog_commands, copy_commands, money_commands, upkeep_commands
from dmdata.cli.completion import completion_command
from dmdata.cli.console import options_of_group
from dmdata.cli.ending import run


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the entry point of ``dmdata``."""
    run(commands, arguments, name="dmdata")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="dmdata")
@options_of_group
def commands() -> None:
    """Read a requester-pays release of datamodels: lazily, exactly, and with the price known first."""


for _command in (
    artifact_commands.list_artifacts,
    artifact_commands.describe,
    artifact_commands.estimate,
    copy_commands.get,
    copy_commands.mirror,
    copy_commands.compare,
    money_commands.spend,
    money_commands.prices,
    money_commands.config,
    upkeep_commands.doctor,
    upkeep_commands.cache,
    catalog_commands.catalog,
    completion_command("dmdata"),
):
    commands.add_command(_command)
