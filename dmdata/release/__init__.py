"""From names to arrays, prices and copies: open, estimate, get, mirror, verify, and catalogs of any bucket."""
