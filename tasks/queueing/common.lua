-- What every script of the queue begins with: names for its keys (see keys.py), and the steps that moves are made of.
-- KEYS are the same for all scripts; the first argument is what comes before the names of the keys.
local MESSAGES, READY, LEASES, HOLDERS, DELAYED, RETURNS, COUNTS, RATE, SWEEPS, WAKE, REFUSED, PROBE, LIST_FACTS, SUMS, SERVED,
  ALIVE, IDLE, WORKERS, FILLS = unpack(KEYS)
local LISTS, READY_OF, WAKE_OF, CACHE_OF, HOT_OF, COPIES_OF, LAST, COMPUTES = ARGV[1] .. 'list:', ARGV[1] .. 'ready:',
  ARGV[1] .. 'wake:', ARGV[1] .. 'cache:', ARGV[1] .. 'hot:', ARGV[1] .. 'copies:', ARGV[1] .. 'last', ARGV[1] .. 'computes'
local LONGEST_TURN = 20
local KEPT_REFUSED, KEPT_BYTES = 100, 4096
-- A worker speaks at least once a second. What it holds is nobody's once it has been silent for so long.
local DEAD_S = 6
-- Times are summed up in milliseconds since 2023, or a double could not hold the sum of a million of them.
local SUM_BASE_MS = 1.7e12
-- More tokens than a worker ever has in hand.
local COMPUTING = 1e14
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

-- A record is a line of JSON and then the message. The line is [turn, list, organization, tokens], and, except in a record of
-- a release that knew no more, the tokens of the static part, its chain ("link:tokens link:tokens") and the head start. Returns
-- these and the message, or nothing if somebody else wrote it.
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
  return {
    turn = turn, list = list, organization = organization, tokens = math.floor(tokens),
    static = tonumber(header[5]) or 0, chain = type(header[6]) == 'string' and header[6] or '',
    head_start = tonumber(header[7]) or 0,
  }, string.sub(record, border + 1)
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

-- Counts a message that begins (sign 1) or ends (sign -1) to wait; or so many of a list, that have `header.tokens` together.
local function count_waiting(header, sign, requests)
  local number = sign * (requests or 1)
  local priority = string.match(header.list, ':(%a+)$')
  count('priority ' .. ((priority == 'high' or priority == 'low') and priority or 'normal'), number)
  if not count('requests', number) then
    -- A release that does not count these may have taken some while this one ran beside it.
    redis.call('HDEL', COUNTS, 'priority high', 'priority normal', 'priority low')
  end
  count('requests ' .. header.organization, number)
  if header.tokens > 0 then
    count('tokens', sign * header.tokens)
    count('tokens ' .. header.organization, sign * header.tokens)
  end
end

local alive_workers

-- Whether a worker was heard of lately. All that were are read once.
local function is_alive(worker)
  if not alive_workers then
    alive_workers = {}
    for _, name in ipairs(redis.call('ZRANGE', ALIVE, '(' .. stamp(now - DEAD_S), '+inf', 'BYSCORE')) do
      alive_workers[name] = true
    end
  end
  return alive_workers[worker]
end

-- Wakes a worker, unless it is being woken already.
local function wake(worker)
  local list = WAKE_OF .. worker
  if redis.call('LLEN', list) > 0 then
    return false
  end
  redis.call('LPUSH', list, 1)
  redis.call('EXPIRE', list, 60)
  return true
end

-- Tells whether a worker that has room may be woken.
local function may_wake(worker, except)
  return worker ~= except and is_alive(worker) and redis.call('LLEN', WAKE_OF .. worker) == 0
end

-- The least loaded of some workers that may be woken, and what it has in hand; or nothing. `loads` has what each has in hand, and
-- false for one without room. One that still computes the prompts of what it took comes after all others: what is new would wait
-- for these.
local function lightest_of(workers, loads, except)
  local best, least
  for index, worker in ipairs(workers) do
    local rank = tonumber(loads[index])
    if rank and (not best or rank < least) and may_wake(worker, except) then
      if (tonumber(redis.call('HGET', COMPUTES, worker)) or 0) > now then
        rank = rank + COMPUTING
      end
      if not best or rank < least then
        best, least = worker, rank
      end
    end
  end
  return best, best and least % COMPUTING
end

-- The least loaded of the workers that hold a profile.
local function least_loaded_holder(profile, except)
  local holders = redis.call('HKEYS', COPIES_OF .. profile)
  if #holders > 0 then
    return lightest_of(holders, redis.call('ZMSCORE', IDLE, unpack(holders)), except)
  end
end

-- The same of all workers, of which only the first few are looked at: they come in the order of their loads.
local function least_loaded(except)
  local idle, workers, loads = redis.call('ZRANGE', IDLE, 0, 7, 'WITHSCORES'), {}, {}
  for index = 1, #idle, 2 do
    workers[#workers + 1], loads[#loads + 1] = idle[index], idle[index + 1]
  end
  return lightest_of(workers, loads, except)
end

local function profile_of(list)
  return string.match(list, '^[^:]*')
end

-- Wakes who had best look at a list: the least loaded worker that holds its profile, or else any. One that cannot have it yet
-- finds out when it can. If another has less than half of what the holder has in hand, it looks too.
local function wake_for(list, except)
  local best, load = least_loaded_holder(profile_of(list), except)
  local lightest, least = least_loaded(except)
  if best then
    wake(best)
    if lightest and lightest ~= best and 2 * least < load then
      wake(lightest)
    end
  elseif lightest then
    wake(lightest)
  elseif not except and redis.call('LLEN', WAKE) == 0 then
    -- For one that has never asked yet, or is of a release that blocks on this alone.
    redis.call('LPUSH', WAKE, 1)
  end
end

-- Counts what waits in a list, and sums up when it came.
local function add_to_sum(list, turn, head_start, sign)
  if redis.call('HINCRBY', SUMS, list .. ' count', sign) > 0 then
    redis.call('HINCRBY', SUMS, list, string.format('%.0f', sign * (math.floor((turn + head_start) * 1000) - SUM_BASE_MS)))
  else
    redis.call('HDEL', SUMS, list, list .. ' count')
  end
end

-- What is known of a list that is not empty: static tokens, head start, chain and organization.
local function list_facts(text)
  local static, head_start, chain, organization = string.match(text or '', '^(%d+)\t([%d.-]+)\t([^\t]*)\t(.*)$')
  return static and {static = tonumber(static), head_start = tonumber(head_start), chain = chain, organization = organization}
end

-- The lists that are ready, of one organization, whose profiles one worker holds.
local function hot(worker, organization)
  return HOT_OF .. worker .. '/' .. organization
end

-- Tells the workers that hold a list's profile at which turn it is ready, or, without a turn, that it is empty.
local function tell_holders(list, organization, turn)
  local copies = redis.call('HGETALL', COPIES_OF .. profile_of(list))
  for index = 1, #copies, 2 do
    if string.sub(copies[index + 1], 1, 4) == 'held' then
      if turn then
        redis.call('ZADD', hot(copies[index], organization), turn, list)
      else
        redis.call('ZREM', hot(copies[index], organization), list)
      end
    end
  end
end

-- Lists a list as one of its organization that is ready. One that had nothing ready begins where the others are: neither the
-- time in which it asked for nothing nor what it got before is held against anybody.
local function make_ready(header, turn, only)
  redis.call('ZADD', READY, only, turn, header.list)
  if redis.call('ZADD', READY_OF .. header.organization, only, 'CH', turn, header.list) > 0 then
    redis.call('HSETNX', LIST_FACTS, header.list,
      string.format('%d\t%s\t%s\t%s', header.static, header.head_start, header.chain, header.organization))
    redis.call('ZADD', SERVED, 'GT', redis.call('HGET', RATE, 'served') or 0, header.organization)
    tell_holders(header.list, header.organization, turn)
  end
end

-- Puts a message where the next one is taken from: it has waited before.
local function put_first(tag, header)
  redis.call('RPUSH', LISTS .. header.list, header.turn .. ' ' .. tag)
  add_to_sum(header.list, header.turn, header.head_start, 1)
  make_ready(header, header.turn, 'LT')
end

local function speak_for_list(list, organization)
  local first = redis.call('LINDEX', LISTS .. list, -1)
  if first then
    local turn = split(first) or stamp(now)
    redis.call('ZADD', READY, turn, list)
    redis.call('ZADD', READY_OF .. organization, turn, list)
    tell_holders(list, organization, turn)
  else
    redis.call('ZREM', READY, list)
    redis.call('ZREM', READY_OF .. organization, list)
    redis.call('HDEL', LIST_FACTS, list)
    redis.call('HDEL', SUMS, list, list .. ' count')
    tell_holders(list, organization, nil)
  end
end

-- Takes a message that waits or is delayed out of its place. What was given back lies near the end that is searched first.
local function take_out(tag, header)
  if redis.call('ZREM', DELAYED, tag) == 0
    and redis.call('LREM', LISTS .. header.list, -1, header.turn .. ' ' .. tag) > 0 then
    add_to_sum(header.list, header.turn, header.head_start, -1)
    speak_for_list(header.list, header.organization)
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
    local was_delayed = redis.call('ZREM', DELAYED, tag) == 1
    local header = find(tag)
    if header then
      count_waiting(header, -1)
      if not was_delayed then
        add_to_sum(header.list, header.turn, header.head_start, -1)
      end
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

-- Notes that a worker begins or ceases to hold a profile, where requests of it wait. Returns whether some do.
local function note_hot(worker, profile, holds)
  local waits = false
  for _, suffix in ipairs({'', ':high', ':low'}) do
    local list = profile .. suffix
    local turn = redis.call('ZSCORE', READY, list)
    local facts = turn and list_facts(redis.call('HGET', LIST_FACTS, list))
    waits = waits or facts
    if facts and holds then
      redis.call('ZADD', hot(worker, facts.organization), turn, list)
    elseif facts then
      redis.call('ZREM', hot(worker, facts.organization), list)
    end
  end
  return waits
end

-- Notes that a worker has so many tokens of a link's prefix: on the GPU; there or in RAM; there, in RAM or on disk. What it is
-- just computing is not held before all of it is there.
local function hold(worker, link, gpu, ram, disk)
  local is_profile = #link == 64
  if disk <= 0 then
    redis.call('HDEL', CACHE_OF .. worker, link)
    if is_profile then
      redis.call('HDEL', COPIES_OF .. link, worker)
      note_hot(worker, link, false)
    end
    return
  end
  redis.call('HSET', CACHE_OF .. worker, link, string.format('%d %d %d', gpu, ram, disk))
  if is_profile then
    local untill, wanted = string.match(redis.call('HGET', COPIES_OF .. link, worker) or '', '^filling (%S+) (%d+)')
    if not untill or disk >= tonumber(wanted) then
      redis.call('HSET', COPIES_OF .. link, worker, string.format('held %d', disk))
      if note_hot(worker, link, true) and untill then
        -- Its siblings have waited for this.
        wake(worker)
      end
    end
  end
end

-- Notes that a worker computes a profile of so many tokens, for that long at most. One that reports nothing would never say
-- that it is done.
local function fill(worker, profile, tokens, seconds)
  if redis.call('HEXISTS', WORKERS, worker) == 0 then
    return
  end
  redis.call('HSET', COPIES_OF .. profile, worker, string.format('filling %s %d', stamp(now + seconds), tokens))
  note_hot(worker, profile, false)
  redis.call('ZADD', FILLS, stamp(now + seconds), profile .. ' ' .. worker)
end

-- Until when a worker computes a profile, of what `copies` has of it; nothing if it does not.
local function filling_end(how)
  return tonumber(string.match(how or '', '^filling (%S+)'))
end

-- Says 'held' if a worker has so many tokens of a profile on the GPU, or 'filling' if it computes them; or nothing.
local function state_of_copy(profile, worker, how, tokens)
  local gpu = string.match(redis.call('HGET', CACHE_OF .. worker, profile) or '', '^(%d+)')
  if gpu and tonumber(gpu) >= tokens then
    return 'held'
  end
  return (filling_end(how) or 0) > now and 'filling' or nil
end

local function forget_cache(worker)
  for _, link in ipairs(redis.call('HKEYS', CACHE_OF .. worker)) do
    hold(worker, link, 0, 0, 0)
  end
end

local function forget_worker(worker)
  forget_cache(worker)
  redis.call('DEL', CACHE_OF .. worker, WAKE_OF .. worker)
  redis.call('ZREM', ALIVE, worker)
  redis.call('ZREM', IDLE, worker)
  redis.call('HDEL', WORKERS, worker)
  redis.call('HDEL', COMPUTES, worker)
end

-- Forgets some workers that have been silent for long, and what was begun to be computed and never was.
local function forget_silent(most)
  for _, worker in ipairs(redis.call('ZRANGE', ALIVE, '-inf', stamp(now - 10 * DEAD_S), 'BYSCORE', 'LIMIT', 0, most)) do
    forget_worker(worker)
  end
  for _, fill_name in ipairs(redis.call('ZRANGE', FILLS, '-inf', stamp(now), 'BYSCORE', 'LIMIT', 0, 4 * most)) do
    local profile, worker = string.match(fill_name, '^(%S+) (.*)$')
    if (filling_end(redis.call('HGET', COPIES_OF .. profile, worker)) or math.huge) <= now then
      redis.call('HDEL', COPIES_OF .. profile, worker)
    end
    redis.call('ZREM', FILLS, fill_name)
  end
end
