"""Keys and values: who holds which block (blocks, tables), where they lie (store), how many there are (budget)."""
