"""Networks by name: --network transformer."""
