"""What a catalog says: artifacts by name or glob, addresses, local folders, and which rows are held out."""
