"""What every room uses: files and places, messages, registries, progress."""
