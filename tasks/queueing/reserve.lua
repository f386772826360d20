-- Take the oldest message of the list that has waited longest, under a lease, in one step: at no instant is it held by a
-- socket alone. What is due of the delayed ones goes back to its list first.
-- ARGV: holder. Returns {tag, record, how often it came back before}, or false if none waits.
local DUE_AT_ONCE, STALE_AT_ONCE, HALF_LIFE_S = 16, 1000, 30
local holder = ARGV[2]

-- Requests and tokens that left, each worth half as much for every half-life that has passed since.
local function note_leaving(tokens)
  local seen = redis.call('HMGET', RATE, 'at', 'since', 'requests', 'tokens')
  local kept = seen[1] and 0.5 ^ (math.max(0, now - seen[1]) / HALF_LIFE_S) or 0
  redis.call('HSET', RATE, 'at', stamp(now), 'since', seen[2] or stamp(now),
    'requests', stamp((seen[3] or 0) * kept + 1), 'tokens', stamp((seen[4] or 0) * kept + tokens))
end

for _, tag in ipairs(redis.call('ZRANGE', DELAYED, '-inf', stamp(now), 'BYSCORE', 'LIMIT', 0, DUE_AT_ONCE)) do
  local header = find(tag)
  redis.call('ZREM', DELAYED, tag)
  if header then
    put_first(tag, header)
  else
    forget(tag)
  end
end
for _ = 1, STALE_AT_ONCE do
  local list = redis.call('ZRANGE', READY, 0, 0)[1]
  if not list then
    return false
  end
  local element = redis.pcall('RPOP', LISTS .. list)
  if type(element) == 'table' then
    refuse('no list', list)
    redis.call('ZREM', READY, list)
    element = false
  else
    speak_for_list(list)
  end
  local turn, tag = split(element or '')
  local record = tag and redis.call('HGET', MESSAGES, tag)
  if element and not tag then
    refuse('no element of a list', element)
  elseif record and not redis.call('ZSCORE', LEASES, tag) and not redis.call('ZSCORE', DELAYED, tag) then
    local header = read(record)
    if not header then
      redis.call('HDEL', MESSAGES, tag)
      refuse('no record of a message', tag .. '\n' .. record)
    elseif header.turn == turn then
      -- Otherwise it was withdrawn and put again, and this is what was left of its first place.
      lease(tag, holder)
      count_waiting(header, -1)
      note_leaving(header.tokens)
      if redis.call('EXISTS', READY) == 1 then
        wake_one()
      end
      return {tag, record, tonumber(redis.call('HGET', RETURNS, tag) or 0)}
    end
  end
end
-- Nothing but what was withdrawn: the next call goes on.
wake_one()
return false
