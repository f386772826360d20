"""What `bench/queue.py` is made of: the two queues, and the messages that both are given.

messages   of requests, one sealed for real
ours       the queue's own scripts and publisher, and kombu's consumer over our transport
stock      kombu's Redis transport as it comes
"""
