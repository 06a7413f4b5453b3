"""linspec models as transformers models. Nothing here is imported before transformers is."""
