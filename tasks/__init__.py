"""What gateway and workers agree on."""
