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

The side by side over HTTP, which `http_main` begins:

http_work      a scenario's requests as text; http_client asks them of all systems at once
http_engine    simulated engines as servers, behind the routers that http_peers starts
http_ours      the whole gateway, whose workers are http_worker
http_runs      one scenario on all systems; http_load watches processes, http_figures says what came of it
"""
