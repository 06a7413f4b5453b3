"""linspec inside other libraries."""
