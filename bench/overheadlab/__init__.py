"""What `bench/overhead.py` is made of: the systems that are compared, who asks them, and who answers for the model.

system     what a system is: how it is asked, and which processes are it
ours, litellm, portkey, sglang   the systems; `installing` fetches the others'
upstream   the model that takes no time, which answers behind the others; `answering` is its HTTP
client     asks, from a process of its own, over `connection`; `wire` is its HTTP
usage      processor time and memory of processes, from the kernel
rounds     every system in turn, again and again; `figures` makes one table of it
"""
