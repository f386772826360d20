-- Append a message to its profile's list, and wake one worker.
-- KEYS: list, ready, wake. ARGV: profile hash, delivery tag, message.
-- An element of a list is "<time> <tag> <message>": its turn is decided by Redis's clock, whatever the gateways' say.
local time = redis.call('TIME')
local now = string.format('%d.%06d', time[1], time[2])
redis.call('LPUSH', KEYS[1], now .. ' ' .. ARGV[2] .. ' ' .. ARGV[3])
redis.call('ZADD', KEYS[2], 'NX', now, ARGV[1])
if redis.call('LLEN', KEYS[3]) == 0 then
  redis.call('LPUSH', KEYS[3], 1)
end
