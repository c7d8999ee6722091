"""The directory of a run: its pinned spec, rows, digests and provenance; created, trained, extended, exported."""
