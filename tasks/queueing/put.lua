-- Append a message to its profile's list, and wake one worker.
-- KEYS: list, ready, wake. ARGV: profile hash, message.
-- Returns how many messages the list holds.
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local length = redis.call('LPUSH', KEYS[1], ARGV[2])
redis.call('ZADD', KEYS[2], 'NX', now, ARGV[1])
if redis.call('LLEN', KEYS[3]) == 0 then
  redis.call('LPUSH', KEYS[3], 1)
end
return length
