"""What a gateway tells of itself and of the queue. Names and meanings are in `tasks.metrics`.

`http` counts requests, `readings` looks up what this process holds, `queue` what all gateways share, and `exposing`
puts them together, on the gateway's port or on one of their own.
"""
