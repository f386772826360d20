-- The cheapest request here and now: its turn, plus what computing the uncached part of its profile on this worker costs.
--
-- `affinity` says how many seconds of waiting a second of computing is worth; as turns pass, waiting always wins in the end.
-- A profile that other workers hold is left to them until the requests that wait for it have together waited `patience` times
-- what one more copy costs, so that a copy is never made for less waiting than it saves (ski rental): computing the prefix, and
-- `EVICTION` times that where a known prefix must make room for it. A profile that this worker is just computing waits for it.
--
-- Nothing waits while holders take everything at once, however much they have in hand, so a worker with memory to spare, `ROOM`
-- times what the copy takes, has it at once if it has `BALANCE` times as many tokens less in hand than any holder.
local TAKES_BATCHES = true
local EVICTION, ROOM, BALANCE = 3, 12, 4
local function consider(candidate, worker)
  local eligible_at = 0
  if candidate.filling then
    eligible_at = candidate.filling
  elseif candidate.copies > 0 then
    local uncached = candidate.static - candidate.cached
    local evicts = uncached > worker.free_tokens
    local due = worker.patience * candidate.seconds * (evicts and EVICTION or 1)
    if worker.free_tokens < ROOM * uncached or (candidate.lightest or 0) - worker.load <= BALANCE * uncached then
      eligible_at = worker.at + math.max(0, due - candidate.waited) / math.max(1, candidate.waiting)
    end
  end
  return candidate.turn + worker.affinity * candidate.seconds, eligible_at
end
