-- What a worker wishes, and what there is for it: where it stands among the others, how much of it an organization may have, which
-- lists are looked at, and what a strategy needs to know of them. It comes before reserve.lua, whose arguments it reads.
local OLDEST, HOTTEST, ORGANIZATIONS, TOLD_AT_MOST = 8, 4, 8, 6
-- One in so many of a worker's places, and of the tokens that it computes at once, is left to others by an organization that
-- floods. That takes more requests waiting than one in so many of those that the worker can run.
local KEPT_PLACES, KEPT_TOKENS, FLOOD = 16, 8, 4
-- So long counts what was known of how many requests a worker runs with a profile.
local RUNS_OF, RUNS_S = ARGV[1] .. 'runs:', 1
local worker = cjson.decode(ARGV[3])
worker.at = now
-- A worker of an earlier release does not say these.
worker.seats, worker.organizations, worker.hot = worker.seats or 0, worker.organizations or {}, worker.hot or {}

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
    worker.is_next, worker.next_name = next_name == own, next_name
  end
end

local asking

-- How many organizations ask: those that wait, and those of which the worker runs something. They are counted once.
local function count_asking()
  if not asking then
    local seen = {}
    asking = 0
    for _, names in ipairs({worker.organizations, redis.call('ZRANGE', SERVED, 0, 8 * ORGANIZATIONS)}) do
      for _, name in ipairs(names) do
        asking, seen[name] = asking + (seen[name] and 0 or 1), true
      end
    end
  end
  return asking
end

-- Whether an organization has more waiting than its share of all that waits, while others ask.
local function floods(organization)
  local counted = redis.call('HMGET', COUNTS, 'requests', 'requests ' .. organization)
  local own, all = tonumber(counted[2]) or 0, tonumber(counted[1]) or 0
  return worker.seats > 0 and FLOOD * own > worker.seats and count_asking() * own > all
end

-- Says how many requests of an organization, and how many tokens to be computed, the worker may take. One that floods leaves the
-- last places and the last tokens to others, or these would wait for the end of somebody's answer, or of somebody's prompt. Where
-- nobody else asks, all is its share.
local function allow(organization)
  worker.places, worker.tokens = worker.room, worker.budget
  if floods(organization) then
    worker.places = worker.places - math.floor(worker.seats / KEPT_PLACES)
    worker.tokens = worker.tokens - math.floor((worker.budget + worker.in_flight) / KEPT_TOKENS)
  end
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

-- Notes how many requests a worker runs with a profile.
local function note_runs(worker, profile, runs)
  redis.call('HSET', RUNS_OF .. profile, worker, string.format('%d %s', runs, stamp(now)))
  redis.call('EXPIRE', RUNS_OF .. profile, 60)
end

-- How many a worker ran lately with a profile; 0 if that is not known.
local function runs_of(profile, worker)
  local runs, at = string.match(redis.call('HGET', RUNS_OF .. profile, worker) or '', '^(%d+) (%S+)$')
  return runs and now - at < RUNS_S and tonumber(runs) or 0
end

-- How many live workers but `worker` hold a profile or are computing it, and until when `worker` computes it, if it does. If it
-- `has_room` for the profile, also how many tokens the least loaded of those that hold it and have room has in hand, if there is
-- one, and how many requests the one with the fewest runs with this profile: a copy that needs room is never made at once.
local function copies_of(profile, worker, has_room)
  local others, filling, lightest, fewest = 0, nil, nil, nil
  local found = redis.call('HGETALL', COPIES_OF .. profile)
  for index = 1, #found, 2 do
    local name, untill = found[index], filling_end(found[index + 1])
    if untill and untill <= now then
      redis.call('HDEL', COPIES_OF .. profile, name)
    elseif name == worker then
      filling = untill
    elseif is_alive(name) then
      others = others + 1
      if has_room then
        local load = not untill and tonumber(redis.call('ZSCORE', IDLE, name))
        if load and (not lightest or load < lightest) then
          lightest = load
        end
        fewest = math.min(fewest or math.huge, runs_of(profile, name))
      end
    end
  end
  return others, filling, lightest, fewest
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
      local has_room = candidate.static - candidate.cached <= worker.free_tokens
      candidate.copies, candidate.filling, candidate.lightest, candidate.fewest =
        copies_of(candidate.profile, worker.worker, has_room)
    end
  end
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
      static = one.static, seconds = one.seconds, copies = one.copies, lightest = one.lightest, fewest = one.fewest,
      filling = one.filling, price = one.price, eligible_at = one.eligible_at,
    }
  end
  return cjson.encode({
    strategy = STRATEGY, worker = worker.worker, organization = organization, at = now, batch = batch, chosen = 0,
    candidates = shown, worker_facts = {
      seats = worker.seats, room = worker.room, budget = worker.budget, in_flight = worker.in_flight, load = worker.load,
      free_tokens = worker.free_tokens, affinity = worker.affinity, patience = worker.patience,
      is_least_loaded = worker.is_least_loaded, is_next = worker.is_next, prefill_rate = worker.prefill_rate,
      ram_rate = worker.ram_rate, disk_rate = worker.disk_rate,
    },
  })
end

