"""The self-contained page about datamodels: an explorer that asks no server for anything."""
