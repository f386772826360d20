"""What MetaQore's rules say of a request: decided at the gateway, and once more before a worker runs it."""
