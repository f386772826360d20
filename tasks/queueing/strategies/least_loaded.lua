-- The request whose turn is the earliest goes to the worker that has the fewest tokens in hand, of those with room.
local TAKES_BATCHES = false
local LOOK_AGAIN_S = 0.1
local function consider(candidate, worker)
  return candidate.turn, worker.is_least_loaded and 0 or worker.at + LOOK_AGAIN_S
end
