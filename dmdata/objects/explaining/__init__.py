"""Errors for what goes wrong with a store, each with its remedy, whatever boto3, obstore or the server called it."""
