"""Integer codes of weights and of cache entries, and what calibrates them."""
