"""Checkpoints in formats of other projects: GGUF files, and packages that carry one."""
