-- Take the oldest message of the profile that has waited longest, under a lease, in one step: at no instant is it
-- held by a socket alone.
-- KEYS: ready, wake, leased, leases, refused, waiting. ARGV: prefix of the lists.
-- Returns {delivery tag, message}, or false if none waits.
local ELEMENT = '^(%d+%.%d+) (%S+) (.*)$'
local time = redis.call('TIME')
local now = string.format('%d.%06d', time[1], time[2])
while true do
  local hash = redis.call('ZRANGE', KEYS[1], 0, 0)[1]
  if not hash then
    return false
  end
  local list = ARGV[1] .. hash
  local element = redis.call('RPOP', list)
  local head = redis.call('LINDEX', list, -1)
  if head then
    -- The next message's own time decides when this profile's turn comes again.
    redis.call('ZADD', KEYS[1], string.match(head, ELEMENT) or now, hash)
  else
    redis.call('ZREM', KEYS[1], hash)
  end
  if element then
    local _, tag, message = string.match(element, ELEMENT)
    if message then
      if redis.call('DECR', KEYS[6]) < 0 then
        -- The counter was lost, or is younger than the message.
        redis.call('SET', KEYS[6], 0)
      end
      redis.call('HSET', KEYS[3], tag, #hash .. ':' .. hash .. element)
      redis.call('ZADD', KEYS[4], now, tag)
      if redis.call('EXISTS', KEYS[1]) == 1 and redis.call('LLEN', KEYS[2]) == 0 then
        redis.call('LPUSH', KEYS[2], 1)
      end
      return {tag, message}
    end
    -- Not written by put.lua. The last hundred are kept for whoever wants to know where they came from.
    redis.call('LPUSH', KEYS[5], element)
    redis.call('LTRIM', KEYS[5], 0, 99)
  end
end
