-- Give the messages whose lease has ended back to their lists: their worker is gone.
-- KEYS: ready, wake, leased, leases, waiting. ARGV: prefix of the lists, length of a lease in seconds, how many at the most.
-- Returns how many were given back.
local time = redis.call('TIME')
local oldest = time[1] + time[2] / 1000000 - ARGV[2]
local back = {}
for _, tag in ipairs(redis.call('ZRANGE', KEYS[4], '-inf', oldest, 'BYSCORE', 'LIMIT', 0, ARGV[3])) do
  local held = redis.call('HGET', KEYS[3], tag)
  redis.call('HDEL', KEYS[3], tag)
  redis.call('ZREM', KEYS[4], tag)
  if held then
    local length, rest = string.match(held, '^(%d+):(.*)$')
    local hash, element = string.sub(rest, 1, length), string.sub(rest, length + 1)
    table.insert(back, {hash, element, string.match(element, '^%d+%.%d+')})
  end
end
-- The newest first, each behind the one before: the oldest ends up where the next one is taken from.
table.sort(back, function(a, b) return tonumber(a[3]) > tonumber(b[3]) end)
for _, entry in ipairs(back) do
  redis.call('RPUSH', ARGV[1] .. entry[1], entry[2])
  redis.call('ZADD', KEYS[1], 'LT', entry[3], entry[1])
end
if #back > 0 and redis.call('LLEN', KEYS[2]) == 0 then
  redis.call('LPUSH', KEYS[2], 1)
end
if #back > 0 then
  redis.call('INCRBY', KEYS[5], #back)
end
return #back
