-- Give a message whose lease has ended back to its list, as the oldest.
-- KEYS: ready, wake, unacked, unacked_index.
-- ARGV: delivery tag, prefix of the lists, prefix of routing keys, length of a lease in seconds.
-- Returns 1 if it was given back, 0 if nobody holds it or its lease was renewed meanwhile.
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local renewed = redis.call('ZSCORE', KEYS[4], ARGV[1])
if renewed and now - renewed < tonumber(ARGV[4]) then
  return 0
end
local held = redis.call('HGET', KEYS[3], ARGV[1])
redis.call('HDEL', KEYS[3], ARGV[1])
redis.call('ZREM', KEYS[4], ARGV[1])
if not held then
  return 0
end
local parts = cjson.decode(held)
local exchange, routing_key = parts[2], parts[3]
local tail = ',"' .. exchange .. '","' .. routing_key .. '"]'
local raw = string.sub(held, 2, #held - #tail)
local hash = string.sub(routing_key, #ARGV[3] + 1)
redis.call('RPUSH', ARGV[2] .. hash, raw)
redis.call('ZADD', KEYS[1], 'LT', parts[1]['properties']['published_at'] or now, hash)
if redis.call('LLEN', KEYS[2]) == 0 then
  redis.call('LPUSH', KEYS[2], 1)
end
return 1
