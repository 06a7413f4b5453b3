"""Hugging Face families: configurations and tensor names, both ways."""
