"""Which tokens of a block are decided in a round, one rule a file."""
