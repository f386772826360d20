-- Take the requests that a worker had best run now, under leases, in one step: at no instant are they held by a socket alone.
-- ARGV: holder, what the worker wishes as JSON (see pull.py). Returns {messages, next, decision, left}: of each message its tag,
-- its record, and how often it came back before; in how many seconds something becomes eligible here, or ''; why it was
-- decided so, as JSON, or ''; and how many lists still have something.
--
-- The organization that was served the fewest tokens comes first. Of its lists, those that have waited longest and those
-- whose profile this worker holds are looked at, a bounded number of each, and the strategy says which is the cheapest. What
-- is taken is a batch of one list: as many as there is room for, in requests and in tokens to be computed. If nothing of an
-- organization may be taken here, the next one is looked at.
local DUE_AT_ONCE, STRAYS_AT_ONCE = 16, 8
local OLDEST, HOTTEST, ORGANIZATIONS, TOLD_AT_MOST, HALF_LIFE_S = 8, 4, 8, 6, 30
-- One in so many of a worker's places, and of the tokens that it computes at once, is left to others by an organization that
-- floods. That takes more requests waiting than one in so many of those that the worker can run.
local KEPT_PLACES, KEPT_TOKENS, FLOOD = 16, 8, 4
-- Where more than this share of what a worker may compute at once is in flight, what needs nothing computed goes first.
local PASSING = 0.25
-- How many elements of what was withdrawn are passed over at most: the next call goes on.
local stale_left = 1000
-- Whether something does not fit beside what is computed.
local too_long = false
local holder = ARGV[2]
local worker = cjson.decode(ARGV[3])
worker.at = now
-- A worker of an earlier release does not say these.
worker.seats, worker.organizations, worker.hot = worker.seats or 0, worker.organizations or {}, worker.hot or {}

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

-- Whether a live worker with room has less in hand than this one, and, where that is the strategy, whether it is this one's turn.
local function compare()
  local own = worker.worker
  worker.is_least_loaded = true
  local idle = redis.call('ZRANGE', IDLE, 0, 7, 'WITHSCORES')
  for index = 1, #idle, 2 do
    if tonumber(idle[index + 1]) < worker.load and idle[index] ~= own and is_alive(idle[index]) then
      worker.is_least_loaded = false
      break
    end
  end
  if STRATEGY == 'round_robin' then
    -- The next by name after the last one, or else the first of all.
    local last, next_name = redis.call('GET', LAST) or '', own
    for _, name in ipairs(redis.call('ZRANGE', IDLE, 0, -1)) do
      local comes_before = name < next_name
      if (name > last) ~= (next_name > last) then
        comes_before = name > last
      end
      if comes_before and is_alive(name) then
        next_name = name
      end
    end
    worker.is_next = next_name == own
  end
end

-- How much of a profile's prefix the worker has, tier by tier, and how long it takes to have all of it on the GPU. `known` is
-- what it has of the links from `first` to `last`; the longest prefix that any of them tells of counts.
local function price_prefix(candidate, known, first, last)
  local gpu, ram, disk = 0, 0, 0
  for index = first, last do
    if known[index] then
      local g, r, d = string.match(known[index], '^(%d+) (%d+) (%d+)$')
      gpu, ram, disk = math.max(gpu, g or 0), math.max(ram, r or 0), math.max(disk, d or 0)
    end
  end
  local static = candidate.static
  gpu, ram, disk = math.min(gpu, static), math.min(ram, static), math.min(disk, static)
  local function loading(tokens, rate)
    -- From a tier whose speed is not known, it takes as long as computing.
    return tokens > 0 and tokens / (rate > 0 and rate or worker.prefill_rate) or 0
  end
  candidate.gpu, candidate.cached = gpu, disk
  candidate.seconds = (static - disk) / worker.prefill_rate
    + loading(ram - gpu, worker.ram_rate) + loading(disk - ram, worker.disk_rate)
end

-- Says how many requests of an organization, and how many tokens to be computed, the worker may take. One that floods, with more
-- waiting than its share of all that waits, leaves the last places and the last tokens to others, or these would wait for the end
-- of somebody's answer, or of somebody's prompt. Where nobody else asks, all is its share.
local function allow(organization)
  local asking, seen = 0, {}
  for _, names in ipairs({worker.organizations, redis.call('ZRANGE', SERVED, 0, 8 * ORGANIZATIONS)}) do
    for _, name in ipairs(names) do
      asking, seen[name] = asking + (seen[name] and 0 or 1), true
    end
  end
  local waiting = redis.call('HMGET', COUNTS, 'requests', 'requests ' .. organization)
  local own, all = tonumber(waiting[2]) or 0, tonumber(waiting[1]) or 0
  local floods = worker.seats > 0 and FLOOD * own > worker.seats and asking * own > all
  worker.places = worker.room - (floods and math.floor(worker.seats / KEPT_PLACES) or 0)
  worker.tokens = worker.budget - (floods and math.floor((worker.budget + worker.in_flight) / KEPT_TOKENS) or 0)
end

-- The lists of an organization that are looked at, each with its turn.
local function candidates_of(organization)
  local found, seen = {}, {}
  local function add(pairs_of, most)
    for index = 1, math.min(#pairs_of, 2 * most), 2 do
      local list = pairs_of[index]
      if not seen[list] then
        seen[list] = true
        found[#found + 1] = {list = list, turn = tonumber(pairs_of[index + 1])}
      end
    end
  end
  local ready = READY_OF .. organization
  add(redis.call('ZRANGE', ready, 0, OLDEST - 1, 'WITHSCORES'), OLDEST)
  if #found == OLDEST then
    add(redis.call('ZRANGE', hot(worker.worker, organization), 0, HOTTEST - 1, 'WITHSCORES'), HOTTEST)
  end
  return found
end

-- Completes what the strategy needs to know of lists: what is cached here of their profiles, who else has them, and how long
-- all that waits in them has waited together.
local function complete(candidates)
  local names, links, sums, ranges = {}, {}, {}, {}
  for index, candidate in ipairs(candidates) do
    names[index] = candidate.list
    sums[2 * index - 1], sums[2 * index] = candidate.list, candidate.list .. ' count'
  end
  local texts = redis.call('HMGET', LIST_FACTS, unpack(names))
  for index, candidate in ipairs(candidates) do
    local facts = list_facts(texts[index]) or {static = 0, head_start = 0, chain = ''}
    candidate.static, candidate.head_start, candidate.profile = facts.static, facts.head_start, profile_of(candidate.list)
    ranges[index] = #links + 1
    links[#links + 1] = candidate.profile
    for link in string.gmatch(facts.chain, '(%x+):%d+') do
      links[#links + 1] = link
    end
  end
  ranges[#candidates + 1] = #links + 1
  local known = redis.call('HMGET', CACHE_OF .. worker.worker, unpack(links))
  local counted = redis.call('HMGET', SUMS, unpack(sums))
  for index, candidate in ipairs(candidates) do
    price_prefix(candidate, known, ranges[index], ranges[index + 1] - 1)
    candidate.waiting = math.max(1, counted[2 * index] or 1)
    -- A release that counts nothing may have taken some: none has waited for longer than the first.
    local longest = math.max(0, now - candidate.turn - candidate.head_start)
    candidate.waited = math.max(longest, math.min(candidate.waiting * longest,
      candidate.waiting * (now - SUM_BASE_MS / 1000) - (counted[2 * index - 1] or 0) / 1000))
    candidate.copies = 0
    if candidate.seconds > 0 then
      candidate.copies, candidate.filling, candidate.lightest, candidate.fewest = copies_of(candidate.profile, worker.worker)
    end
  end
end

-- Takes the next messages of a list. Returns them, whether the list was left because the next one does not fit, and their tokens.
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
  end
  return taken, is_full, tokens
end

-- Whoever reads it later sees the chosen one and the cheapest of the others.
local function told(candidates, chosen, batch, organization)
  table.sort(candidates, function(a, b)
    return a == chosen or b ~= chosen and (a.price or math.huge) < (b.price or math.huge)
  end)
  local shown = {}
  for index = 1, math.min(#candidates, TOLD_AT_MOST) do
    local one = candidates[index]
    shown[index] = {
      profile = one.list, turn = one.turn, waiting = one.waiting, waited = one.waited, cached = one.cached, gpu = one.gpu,
      static = one.static, seconds = one.seconds, copies = one.copies, lightest = one.lightest, fewest = one.fewest, filling = one.filling, price = one.price,
      eligible_at = one.eligible_at,
    }
  end
  return cjson.encode({
    strategy = STRATEGY, worker = worker.worker, at = now, batch = batch, chosen = 0, organization = organization, candidates = shown, worker_facts = {
      free_tokens = worker.free_tokens, affinity = worker.affinity, patience = worker.patience, load = worker.load,
      seats = worker.seats, room = worker.room, budget = worker.budget, in_flight = worker.in_flight, is_least_loaded = worker.is_least_loaded,
      is_next = worker.is_next, prefill_rate = worker.prefill_rate, ram_rate = worker.ram_rate, disk_rate = worker.disk_rate,
    },
  })
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
  while stale_left > 0 do
    local candidates = candidates_of(organization)
    if #candidates == 0 then
      return {}, '', false, math.huge
    end
    complete(candidates)
    local best, soonest = nil, math.huge
    for _, candidate in ipairs(candidates) do
      candidate.price, candidate.eligible_at = consider(candidate, worker)
      if candidate.eligible_at > now then
        soonest = math.min(soonest, candidate.eligible_at)
      elseif (not best or candidate.price < best.price) and not (too_long and candidate.seconds > 0) then
        best = candidate
      end
    end
    if not best then
      return {}, '', false, soonest
    end
    local taken, is_full, tokens = take(best, organization)
    if #taken > 0 then
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
    elseif is_full and best.seconds > 0 and (passes or worker.tokens < worker.budget) then
      too_long = true
    elseif is_full then
      return {}, '', worker.tokens == worker.budget, soonest
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
if too_long and not is_full then
  -- Only one with less in hand, or two would wake each other for ever.
  local lightest, least = least_loaded(worker.worker)
  if lightest and least < worker.load then
    wake(lightest)
  end
end
return {messages, soonest < math.huge and stamp(math.max(0, soonest - now)) or '', decision, redis.call('ZCARD', READY)}
