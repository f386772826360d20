-- Lease what a worker runs and Redis has lost. ARGV: holder, tag, record. Returns 1, or 0 if Redis knows it after all.
local holder, tag, record = unpack(ARGV, 2)
if redis.call('HEXISTS', MESSAGES, tag) == 1 or not read(record) then
  return 0
end
go_on_without_memory()
redis.call('HSET', MESSAGES, tag, record)
lease(tag, holder)
return 1
