-- The request whose turn is the earliest goes to the next worker with room, one after the other, in the order of their names.
local TAKES_BATCHES = false
local LOOK_AGAIN_S = 0.1
local function consider(candidate, worker)
  return candidate.turn, worker.is_next and 0 or worker.at + LOOK_AGAIN_S
end
