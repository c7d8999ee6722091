"""What a read costs and who pays for it: dated prices, budgets, and the ledger of what was spent."""
