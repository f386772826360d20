-- Forget a message that waits or is delayed; one that a worker has is left to it. ARGV: tag. Returns 1 if it was forgotten.
local tag = ARGV[2]
if redis.call('HEXISTS', MESSAGES, tag) == 0 or redis.call('ZSCORE', LEASES, tag) then
  return 0
end
go_on_without_memory()
forget(tag)
return 1
