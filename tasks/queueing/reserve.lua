-- Take the oldest message of the profile that has waited longest, under a lease, in one step: at no instant is it
-- held by a socket alone.
-- KEYS: ready, wake, unacked, unacked_index. ARGV: prefix of the lists, exchange, prefix of routing keys.
-- Returns the message, or false if none waits.
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
while true do
  local hash = redis.call('ZRANGE', KEYS[1], 0, 0)[1]
  if not hash then
    return false
  end
  local list = ARGV[1] .. hash
  local raw = redis.call('RPOP', list)
  local head = redis.call('LINDEX', list, -1)
  if head then
    -- The next message's own time decides when this profile's turn comes again.
    local published = cjson.decode(head)['properties']['published_at']
    redis.call('ZADD', KEYS[1], published or now, hash)
  else
    redis.call('ZREM', KEYS[1], hash)
  end
  if raw then
    local tag = cjson.decode(raw)['properties']['delivery_tag']
    -- The message is joined in as it is: cjson would turn its empty lists into objects.
    local held = '[' .. raw .. ',"' .. ARGV[2] .. '","' .. ARGV[3] .. hash .. '"]'
    redis.call('HSET', KEYS[3], tag, held)
    redis.call('ZADD', KEYS[4], now, tag)
    if redis.call('EXISTS', KEYS[1]) == 1 and redis.call('LLEN', KEYS[2]) == 0 then
      redis.call('LPUSH', KEYS[2], 1)
    end
    return raw
  end
end
