-- Take the requests that a worker had best run now, under leases, in one step: at no instant are they held by a socket alone.
-- ARGV: holder, what the worker wishes as JSON (see pull.py). Returns {messages, next, decision, left}: of each message its tag,
-- its record, and how often it came back before; in how many seconds something becomes eligible here, or ''; why it was
-- decided so, as JSON, or ''; and how many lists still have something.
--
-- The organization that was served the fewest tokens comes first. Of its lists, those that have waited longest and those
-- whose profile this worker holds are looked at, a bounded number of each, and the strategy says which is the cheapest. What
-- is taken is a batch of one list: as many as there is room for, in requests and in tokens to be computed. If nothing of an
-- organization may be taken here, the next one is looked at.
local DUE_AT_ONCE, STRAYS_AT_ONCE, HALF_LIFE_S = 16, 8, 30
-- Where more than this share of what a worker may compute at once is in flight, what needs nothing computed goes first.
local PASSING = 0.25
-- How many elements of what was withdrawn are passed over at most: the next call goes on.
local stale_left = 1000
-- Whether something does not fit beside what is computed.
local too_long = false
local holder = ARGV[2]

-- Requests and tokens that left, each worth half as much for every half-life that has passed since.
local function note_leaving(requests, tokens)
  local seen = redis.call('HMGET', RATE, 'at', 'since', 'requests', 'tokens')
  local kept = seen[1] and 0.5 ^ (math.max(0, now - seen[1]) / HALF_LIFE_S) or 0
  redis.call('HSET', RATE, 'at', stamp(now), 'since', seen[2] or stamp(now),
    'requests', stamp((seen[3] or 0) * kept + requests), 'tokens', stamp((seen[4] or 0) * kept + tokens))
end

-- What an organization gets counts for whose turn is next; and where it stood is where one begins that had nothing ready.
local function note_served(organization, tokens)
  redis.call('HSET', RATE, 'served', redis.call('ZSCORE', SERVED, organization) or 0)
  redis.call('ZINCRBY', SERVED, tokens, organization)
  redis.call('SET', LAST, worker.worker)
end

-- What is due of the delayed messages goes back to its list.
local function return_due()
  for _, tag in ipairs(redis.call('ZRANGE', DELAYED, '-inf', stamp(now), 'BYSCORE', 'LIMIT', 0, DUE_AT_ONCE)) do
    local header = find(tag)
    redis.call('ZREM', DELAYED, tag)
    if header then
      put_first(tag, header)
    else
      forget(tag)
    end
  end
end

-- Lists that a release put here which knows of no organizations are made ready as others are.
local function adopt_strays()
  local oldest = redis.call('ZRANGE', READY, 0, STRAYS_AT_ONCE - 1, 'WITHSCORES')
  local names = {}
  for index = 1, #oldest, 2 do
    names[#names + 1] = oldest[index]
  end
  local known = #names > 0 and redis.call('HMGET', LIST_FACTS, unpack(names)) or {}
  for index, list in ipairs(names) do
    if not known[index] then
      local element = redis.pcall('LINDEX', LISTS .. list, -1)
      if type(element) == 'table' then
        refuse('no list', list)
        redis.call('ZREM', READY, list)
      elseif not element then
        redis.call('ZREM', READY, list)
      else
        local _, tag = split(element)
        local header = tag and find(tag)
        if header and header.list == list then
          make_ready(header, oldest[2 * index], 'LT')
        else
          redis.call('RPOP', LISTS .. list)
          if not tag then
            refuse('no element of a list', element)
          end
          if redis.call('LLEN', LISTS .. list) == 0 then
            redis.call('ZREM', READY, list)
          end
        end
      end
    end
  end
end

-- Takes the next messages of a list. Returns them, whether the list was left because the next one does not fit, and their tokens.
-- What is to be computed of them is in flight then.
local function take(candidate, organization)
  local taken, tokens, budget, is_full, has_passed_over = {}, 0, worker.tokens, false, false
  -- Where a prefix is computed first, the others of it find it then.
  local most = TAKES_BATCHES and candidate.seconds == 0 and worker.places or 1
  local path = LISTS .. candidate.list
  while stale_left > 0 do
    local element = redis.pcall('LINDEX', path, -1)
    if type(element) == 'table' then
      refuse('no list', candidate.list)
      redis.call('ZREM', READY, candidate.list)
      redis.call('ZREM', READY_OF .. organization, candidate.list)
      return taken, false
    elseif not element or #taken >= most then
      break
    end
    local turn, tag = split(element)
    local record = tag and redis.call('HGET', MESSAGES, tag)
    local is_live = record and not redis.call('ZSCORE', LEASES, tag) and not redis.call('ZSCORE', DELAYED, tag)
    local header = is_live and read(record)
    local is_ours = header and header.turn == turn
    if is_ours and has_passed_over and #taken == 0 then
      -- It is not the one that the list was chosen for.
      break
    elseif is_ours then
      local uncached = math.max(0, header.tokens - candidate.cached)
      if uncached > budget and (worker.in_flight > 0 or #taken > 0) then
        is_full = true
        break
      end
      budget = budget - uncached
    end
    redis.call('RPOP', path)
    if not is_ours then
      stale_left, has_passed_over = stale_left - 1, true
    end
    if is_ours or is_live and not header then
      add_to_sum(candidate.list, turn, candidate.head_start, -1)
    end
    if not tag then
      refuse('no element of a list', element)
    elseif is_live and not header then
      redis.call('HDEL', MESSAGES, tag)
      refuse('no record of a message', tag .. '\n' .. record)
    elseif is_ours then
      -- Otherwise it was withdrawn and put again, and this is what was left of its first place.
      lease(tag, holder)
      tokens = tokens + header.tokens
      taken[#taken + 1] = {tag, record, tonumber(redis.call('HGET', RETURNS, tag) or 0)}
    end
  end
  speak_for_list(candidate.list, organization)
  if #taken > 0 then
    count_waiting({list = candidate.list, organization = organization, tokens = tokens}, -1, #taken)
    note_leaving(#taken, tokens)
    note_served(organization, tokens)
    redis.call('HSET', COMPUTES, worker.worker, stamp(now + (worker.in_flight + worker.tokens - budget) / worker.prefill_rate))
  end
  return taken, is_full, tokens
end

-- The cheapest of what may be taken now, and when the first of the others becomes eligible.
local function cheapest(candidates)
  local best, soonest = nil, math.huge
  for _, candidate in ipairs(candidates) do
    if candidate.eligible_at > now then
      soonest = math.min(soonest, candidate.eligible_at)
    elseif (not best or candidate.price < best.price) and not (too_long and candidate.seconds > 0) then
      best = candidate
    end
  end
  return best, soonest
end

-- Looks at one organization. Returns what was taken, why, whether the worker is full, and when something becomes eligible.
--
-- Where something long is being computed and the next one does not fit beside it, what needs nothing computed may pass. It does
-- not pass for ever: once the long one is through, so little is in flight that the next has its turn.
local function try(organization)
  local passes = worker.in_flight > PASSING * (worker.in_flight + worker.budget)
  allow(organization)
  if worker.places <= 0 then
    return {}, '', false, math.huge
  end
  local is_limited = worker.tokens < worker.budget
  while stale_left > 0 do
    local candidates = candidates_of(organization)
    if #candidates == 0 then
      return {}, '', false, math.huge
    end
    complete(candidates)
    for _, candidate in ipairs(candidates) do
      candidate.price, candidate.eligible_at = consider(candidate, worker)
    end
    local best, soonest = cheapest(candidates)
    local taken, is_full, tokens = {}, false, 0
    if best then
      taken, is_full, tokens = take(best, organization)
    end
    if is_full and #taken == 0 and best.seconds > 0 and (passes or is_limited) then
      too_long = true
      best = cheapest(candidates)
      if best then
        taken, is_full, tokens = take(best, organization)
      end
    end
    if not best then
      return {}, '', false, soonest
    elseif #taken > 0 then
      if best.seconds > 0 then
        -- Half as long again as it should take, behind what is computed already.
        fill(worker.worker, best.profile, best.static,
          0.5 + 1.5 * (worker.in_flight + best.static) / worker.prefill_rate)
      else
        note_runs(worker.worker, best.profile, (worker.hot[best.profile] or 0) + #taken)
      end
      local why = told(candidates, best, #taken, organization)
      worker.room, worker.load = worker.room - #taken, worker.load + tokens
      return taken, why, is_full, soonest
    elseif is_full then
      return {}, '', not is_limited, soonest
    end
    -- Nothing but what was withdrawn.
    stale_left = stale_left - 1
  end
  return {}, '', false, now
end

go_on_without_memory()
return_due()
adopt_strays()
forget_silent(1)
redis.call('ZADD', ALIVE, stamp(now), worker.worker)
compare()
local messages, decision, is_full, soonest, looked = {}, '', worker.room <= 0, math.huge, 0
if not is_full then
  for _, organization in ipairs(redis.call('ZRANGE', SERVED, 0, 8 * ORGANIZATIONS)) do
    if redis.call('EXISTS', READY_OF .. organization) == 0 then
      redis.call('ZREM', SERVED, organization)
    else
      local taken, why, full, next_at = try(organization)
      soonest, looked = math.min(soonest, next_at), looked + 1
      messages, decision = taken, why
      is_full = full or worker.room <= 0
      if #taken > 0 or full or looked == ORGANIZATIONS then
        break
      end
    end
  end
end
if worker.room > 0 and not is_full then
  redis.call('ZADD', IDLE, worker.load, worker.worker)
else
  redis.call('ZREM', IDLE, worker.worker)
end
if is_full then
  -- What this worker must leave, another may have.
  local waits = redis.call('ZRANGE', READY, 0, 0)[1]
  if waits then
    wake_for(waits, worker.worker)
  end
end
if worker.is_next == false and soonest < math.huge then
  -- It need not wait until that one looks again by itself.
  wake(worker.next_name)
end
if too_long and not is_full and not worker.is_next then
  -- Only one with less in hand and never past one whose turn it is, or two would wake each other for ever.
  local lightest, least = least_loaded(worker.worker)
  if lightest and least < worker.load then
    wake(lightest)
  end
end
return {messages, soonest < math.huge and stamp(math.max(0, soonest - now)) or '', decision, redis.call('ZCARD', READY)}
