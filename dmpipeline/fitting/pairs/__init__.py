"""Second-order terms: what two training examples do together, beyond what each of them does alone."""
