-- Tell whether one more request may wait. ARGV: organization, its tokens, the most requests and tokens that may wait, and of
-- one organization (0: any number). Returns 0, or in how many seconds there will probably be room: the excess, over the
-- rate at which requests leave. Of an organization's excess it is assumed that it leaves with its share of all.
local organization, tokens = ARGV[2], tonumber(ARGV[3])
local HALF_LIFE_S, UNKNOWN_S, LONGEST_S = 30, 30, 300
need_writes()

local function counted(field)
  return tonumber(redis.call('HGET', COUNTS, field) or 0)
end

-- Requests or tokens that leave in a second: their sum, each worth less the longer ago it was, over what as steady a
-- stream of one a second would have summed up to since the first.
local function leaving(what)
  local seen = redis.call('HMGET', RATE, 'at', 'since', what)
  if not seen[3] then
    return 0
  end
  local sum = seen[3] * 0.5 ^ (math.max(0, now - seen[1]) / HALF_LIFE_S)
  local age = math.max(1, now - seen[2])
  return sum * math.log(2) / HALF_LIFE_S / (1 - 0.5 ^ (age / HALF_LIFE_S))
end

local function wait_s(what, suffix, more, most)
  local waiting = counted(what .. suffix)
  if most == 0 or waiting == 0 or waiting + more <= most then
    -- One that is alone may be of any size, or it could never come in.
    return 0
  end
  local rate = leaving(what) * waiting / math.max(waiting, counted(what))
  local excess = waiting + more - most
  return excess < rate * LONGEST_S and math.max(1, math.ceil(excess / rate)) or rate > 0 and LONGEST_S or UNKNOWN_S
end

local own = ' ' .. organization
return math.max(
  wait_s('requests', '', 1, tonumber(ARGV[4])), wait_s('tokens', '', tokens, tonumber(ARGV[5])),
  wait_s('requests', own, 1, tonumber(ARGV[6])), wait_s('tokens', own, tokens, tonumber(ARGV[7])))
