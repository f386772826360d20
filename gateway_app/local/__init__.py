"""What `bin/run` runs: everything on one machine, with nothing to set up.

`__main__` tells the order; `folder` is `var/`; `environment` decides which services are ours and on which ports;
`services` are the commands; `supervisor` keeps them running; `readiness` waits for them; `demo` is `--once`.
"""
