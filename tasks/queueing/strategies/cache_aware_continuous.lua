-- The cheapest request here and now: its turn, plus what computing the uncached part of its profile on this worker costs.
--
-- `affinity` says how many seconds of waiting a second of computing is worth; as turns pass, waiting always wins in the end.
-- A profile that other workers hold is left to them until the requests that wait for it have together waited `patience` times
-- what one more copy costs, so that a copy is never made for less waiting than it saves (ski rental): computing the prefix, and
-- `EVICTION` times that where a known prefix must make room for it. A profile that this worker is just computing waits for it.
local TAKES_BATCHES = true
local EVICTION = 3
local function consider(candidate, worker)
  local eligible_at = 0
  if candidate.filling then
    eligible_at = candidate.filling
  elseif candidate.copies > 0 then
    local evicts = candidate.static - candidate.cached > worker.free_tokens
    local due = worker.patience * candidate.seconds * (evicts and EVICTION or 1)
    eligible_at = worker.at + math.max(0, due - candidate.waited) / math.max(1, candidate.waiting)
  end
  return candidate.turn + worker.affinity * candidate.seconds, eligible_at
end
