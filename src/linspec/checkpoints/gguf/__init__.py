"""GGUF files: a bounded reader, configurations, tensors, tokenizers."""
