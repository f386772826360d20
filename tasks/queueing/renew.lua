-- Renew leases. A lease belongs to a message and a process.
-- ARGV: holder, tags. Returns for each 1 (it is the holder's), 0 (it is another's, or was given back) or -1 (unknown).
local answers = {}
go_on_without_memory()
for index = 3, #ARGV do
  local tag = ARGV[index]
  local mine = redis.call('HGET', HOLDERS, tag) == ARGV[2]
  local leased = redis.call('ZSCORE', LEASES, tag)
  local header = mine and not leased and find(tag)
  if mine and (leased or header) then
    if header then
      -- Its lease had ended, and nobody has taken it since.
      take_out(tag, header)
    end
    redis.call('ZADD', LEASES, stamp(now), tag)
    answers[#answers + 1] = 1
  elseif redis.call('HEXISTS', MESSAGES, tag) == 1 then
    answers[#answers + 1] = 0
  else
    answers[#answers + 1] = -1
  end
end
return answers
