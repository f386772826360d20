-- Give the messages whose lease has ended back to their lists: their worker is gone.
-- ARGV: length of a lease in seconds, how many at the most, time in which all who live renew. Returns how many were given back.
-- Leases age while Redis is away, and nobody could renew them. So none is ended before the sweeps have gone on for that time
-- without a gap: by then every worker that lives has renewed its own.
local lease_s, most, grace_s = tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])
local last, since = unpack(redis.call('HMGET', SWEEPS, 'last', 'since'))
if not last or not since or now - last > lease_s / 2 or now < tonumber(last) then
  since = stamp(now)
end
go_on_without_memory()
redis.call('HSET', SWEEPS, 'last', stamp(now), 'since', since)
if now - since < grace_s then
  return 0
end
local back, given_back = {}, 0
for _, tag in ipairs(redis.call('ZRANGE', LEASES, '-inf', stamp(now - lease_s), 'BYSCORE', 'LIMIT', 0, most)) do
  local header = find(tag)
  if header then
    table.insert(back, {tag = tag, header = header})
  else
    redis.call('ZREM', LEASES, tag)
    refuse('no record of a leased message', tag .. '\n' .. (redis.call('HGET', MESSAGES, tag) or ''))
    forget(tag)
  end
end
-- The newest first, each behind the one before: the oldest ends up where the next one is taken from.
table.sort(back, function(a, b) return tonumber(a.header.turn) > tonumber(b.header.turn) end)
for _, entry in ipairs(back) do
  -- Its holder stays noted: should it live after all, and come before anybody has taken the message, it goes on with it.
  if pcall(put_first, entry.tag, entry.header) then
    redis.call('ZREM', LEASES, entry.tag)
    redis.call('HINCRBY', RETURNS, entry.tag, 1)
    count_waiting(entry.header, 1)
    given_back = given_back + 1
    wake_for(entry.header.list)
  end
end
return given_back
