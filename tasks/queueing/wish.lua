-- Wish that copies of a profile are on so many workers, and tell where they are. Saying it again changes nothing.
-- ARGV: profile, organization, copies (0: only tell), for how many seconds (0: for ever), tokens of the static part, its chain.
-- Returns how many copies are wanted in the end, how many workers are alive, then those that have it wholly on the GPU, and
-- those that compute it, each as "held <worker>" or "filling <worker>".
-- A wish that does not end is not changed by one that does, and one that does is not noted where no worker is alive.
local WANTED, AWAITED = ARGV[1] .. 'wanted', ARGV[1] .. 'awaited'
local profile, organization, copies, seconds, static, chain = unpack(ARGV, 2)
copies, seconds, static = tonumber(copies), tonumber(seconds), tonumber(static)
local is_json, known = pcall(cjson.decode, redis.call('HGET', WANTED, profile) or '')
local lasts = is_json and type(known) == 'table' and known['until'] == 0 and type(known.copies) == 'number'
local alive = redis.call('ZCOUNT', ALIVE, '(' .. stamp(now - DEAD_S), '+inf')
if copies > 0 and (seconds == 0 or not lasts and alive > 0) then
  local untill = seconds > 0 and now + seconds or 0
  redis.call('HSET', WANTED, profile, cjson.encode({
    organization = organization, copies = copies, ['until'] = untill, static_tokens = static, chain = chain}))
  if seconds > 0 then
    redis.call('ZADD', AWAITED, stamp(untill), profile)
  else
    redis.call('ZREM', AWAITED, profile)
  end
elseif lasts then
  copies = known.copies
end
local answer = {copies, alive}
local found = redis.call('HGETALL', COPIES_OF .. profile)
for index = 1, #found, 2 do
  local worker = found[index]
  local state = is_alive(worker) and state_of_copy(profile, worker, found[index + 1], static)
  if state then
    answer[#answer + 1] = state .. ' ' .. worker
  end
end
return answer
