-- Forget a worker that ends, and what it held. ARGV: worker.
go_on_without_memory()
forget_worker(ARGV[2])
return 1
