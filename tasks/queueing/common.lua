-- What every script of the queue begins with: names for its keys (see keys.py), and the steps that moves are made of.
-- KEYS are the same for all scripts; the first argument is what comes before the name of a list.
local MESSAGES, READY, LEASES, HOLDERS, DELAYED, RETURNS, COUNTS, RATE, SWEEPS, WAKE, REFUSED, PROBE = unpack(KEYS)
local LISTS = ARGV[1]
local LONGEST_TURN = 20
local KEPT_REFUSED, KEPT_BYTES = 100, 4096
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000

local function stamp(seconds)
  return string.format('%.6f', seconds)
end

-- A Redis without memory refuses a script whose first write may take some, and lets one go on that has begun to write.
-- Moving what is there must go on, or a full Redis would never become emptier: this is such a beginning, and does nothing.
local function go_on_without_memory()
  redis.call('HDEL', COUNTS, '')
end

-- Fails where Redis takes no writes: a replica, a full memory, a full disk. It changes nothing.
local function need_writes()
  redis.call('SETRANGE', PROBE, 0, '')
end

local function is_turn(text)
  return #text <= LONGEST_TURN and string.find(text, '^%d+%.%d+$') ~= nil
end

-- Returns turn and tag of an element of a list, or nothing if somebody else wrote it.
local function split(element)
  local turn, tag = string.match(element, '^(%S+) (%S+)$')
  if turn and is_turn(turn) then
    return turn, tag
  end
end

-- A record is a line of JSON, [turn, list, organization, tokens], and then the message. Returns the four and the message, or
-- nothing if somebody else wrote it.
local function read(record)
  local border = string.find(record, '\n', 1, true)
  if not border then
    return nil
  end
  local is_json, header = pcall(cjson.decode, string.sub(record, 1, border - 1))
  if not is_json or type(header) ~= 'table' then
    return nil
  end
  local turn, list, organization, tokens = header[1], header[2], header[3], header[4]
  if type(turn) ~= 'string' or not is_turn(turn) or type(list) ~= 'string'
    or type(organization) ~= 'string' or type(tokens) ~= 'number' or not (tokens >= 0 and tokens < 1e14) then
    return nil
  end
  return {turn = turn, list = list, organization = organization, tokens = math.floor(tokens)},
    string.sub(record, border + 1)
end

local function find(tag)
  local record = redis.call('HGET', MESSAGES, tag)
  return record and read(record)
end

local function count(field, by)
  -- None is left, or the counter was lost and is younger than the messages.
  if redis.call('HINCRBY', COUNTS, field, string.format('%d', by)) <= 0 then
    redis.call('HDEL', COUNTS, field)
    return false
  end
  return true
end

-- Counts a message that begins (sign 1) or ends (sign -1) to wait.
local function count_waiting(header, sign)
  local priority = string.match(header.list, ':(%a+)$')
  count('priority ' .. ((priority == 'high' or priority == 'low') and priority or 'normal'), sign)
  if not count('requests', sign) then
    -- A release that does not count these may have taken some while this one ran beside it.
    redis.call('HDEL', COUNTS, 'priority high', 'priority normal', 'priority low')
  end
  count('requests ' .. header.organization, sign)
  if header.tokens > 0 then
    count('tokens', sign * header.tokens)
    count('tokens ' .. header.organization, sign * header.tokens)
  end
end

local function wake_one()
  if redis.call('LLEN', WAKE) == 0 then
    redis.call('LPUSH', WAKE, 1)
  end
end

-- Puts a message where the next one is taken from: it has waited before.
local function put_first(tag, header)
  redis.call('RPUSH', LISTS .. header.list, header.turn .. ' ' .. tag)
  redis.call('ZADD', READY, 'LT', header.turn, header.list)
end

local function speak_for_list(list)
  local first = redis.call('LINDEX', LISTS .. list, -1)
  if first then
    redis.call('ZADD', READY, split(first) or stamp(now), list)
  else
    redis.call('ZREM', READY, list)
  end
end

-- Takes a message that waits or is delayed out of its place. What was given back lies near the end that is searched first.
local function take_out(tag, header)
  if redis.call('ZREM', DELAYED, tag) == 0
    and redis.call('LREM', LISTS .. header.list, -1, header.turn .. ' ' .. tag) > 0 then
    speak_for_list(header.list)
  end
  count_waiting(header, -1)
end

local function lease(tag, holder)
  redis.call('ZADD', LEASES, stamp(now), tag)
  redis.call('HSET', HOLDERS, tag, holder)
end

-- Forgets a message, wherever it is. Its element stays in its list, and is passed over when its turn comes: searching the list
-- for it would take long.
local function forget(tag)
  if redis.call('ZREM', LEASES, tag) == 0 then
    redis.call('ZREM', DELAYED, tag)
    local header = find(tag)
    if header then
      count_waiting(header, -1)
    end
  end
  redis.call('HDEL', MESSAGES, tag)
  redis.call('HDEL', HOLDERS, tag)
  redis.call('HDEL', RETURNS, tag)
end

-- Keeps what is no message for whoever wants to know where it came from: the last hundred, their beginnings.
local function refuse(why, what)
  redis.call('LPUSH', REFUSED, why .. '\n' .. string.sub(what, 1, KEPT_BYTES))
  redis.call('LTRIM', REFUSED, 0, KEPT_REFUSED - 1)
end
