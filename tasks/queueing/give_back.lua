-- Give a message back that its holder will not run to its end: at once, or after a delay.
-- ARGV: holder, tag, delay in seconds, record (used if Redis has lost the message; may be empty).
-- Returns 1, or 0 if it is another's, or was given back before.
local holder, tag, delay, record = unpack(ARGV, 2)
local known = redis.call('HEXISTS', MESSAGES, tag) == 1
local header = known and find(tag) or not known and read(record)
if not header or known and redis.call('HGET', HOLDERS, tag) ~= holder then
  return 0
end
go_on_without_memory()
if known and not redis.call('ZSCORE', LEASES, tag) then
  take_out(tag, header)
end
if tonumber(delay) > 0 then
  redis.call('ZADD', DELAYED, stamp(now + delay), tag)
else
  put_first(tag, header)
  wake_for(header.list)
end
if not known then
  redis.call('HSET', MESSAGES, tag, record)
end
redis.call('ZREM', LEASES, tag)
redis.call('HDEL', HOLDERS, tag)
redis.call('HINCRBY', RETURNS, tag, 1)
count_waiting(header, 1)
return 1
