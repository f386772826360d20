"""What `bench/scheduling.py` is made of: a fleet of simulated workers in virtual time, and the rules that feed it.

workload    profiles, and requests that ask for them
scenarios   the situations that a rule is judged in
fleet       workers that are driven without a clock, and what is recorded of each request
push        routers that bind a request to a worker when it arrives: the plain ones
rivals      routers after the published rules of other gateways
pull        the queue's own scripts in a real Redis, whose clock the bench sets
figures     what a run's record says
goodput     the highest rate at which requests are in time
plots       pictures of it
"""
