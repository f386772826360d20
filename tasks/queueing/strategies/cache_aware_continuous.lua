-- The cheapest request here and now: its turn, plus what computing the uncached part of its profile on this worker costs.
--
-- `affinity` says how many seconds of waiting a second of computing is worth; as turns pass, waiting always wins in the end.
-- A profile that other workers hold is left to them until the requests that wait for it have together waited `patience` times
-- what one more copy costs, so that a copy is never made for less waiting than it saves (ski rental): computing the prefix, and
-- `EVICTION` times that where a known prefix must make room for it. A profile that this worker is just computing waits for it.
--
-- Nothing waits while holders take everything at once, however much they have in hand. So a worker has a copy at once if it has
-- `BALANCE` times as many tokens less in hand than any holder, and memory to spare: `ROOMY` times what the copy takes, or `ROOM`
-- times where a crowd asks for the profile. That is where each holder runs so many requests with it, at least `FEW`, and one in
-- `CROWD` of all that it can run, that a copy would relieve them.
local TAKES_BATCHES = true
local EVICTION, BALANCE, ROOMY, ROOM, CROWD, FEW = 3, 4, 12, 3, 4, 8

local function has_at_once(candidate, worker, uncached)
  local fewest, lightest = candidate.fewest or 0, candidate.lightest
  local is_crowded = fewest >= FEW and CROWD * fewest >= worker.seats
  if is_crowded then
    -- Where none of them has room for more, all the better.
    lightest = lightest or math.huge
  end
  return worker.free_tokens >= (is_crowded and ROOM or ROOMY) * uncached
    and (lightest or 0) - worker.load > BALANCE * uncached
end

local function consider(candidate, worker)
  local eligible_at = 0
  if candidate.filling then
    eligible_at = candidate.filling
  elseif candidate.copies > 0 then
    local uncached = candidate.static - candidate.cached
    if not has_at_once(candidate, worker, uncached) then
      local due = worker.patience * candidate.seconds * (uncached > worker.free_tokens and EVICTION or 1)
      eligible_at = worker.at + math.max(0, due - candidate.waited) / math.max(1, candidate.waiting)
    end
  end
  return candidate.turn + worker.affinity * candidate.seconds, eligible_at
end
