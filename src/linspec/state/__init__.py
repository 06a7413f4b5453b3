"""What mixers remember of committed tokens: stage, commit, drop."""
