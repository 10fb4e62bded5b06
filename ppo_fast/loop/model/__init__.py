"""The model: loading, towers, head, adapters, memory and export."""
