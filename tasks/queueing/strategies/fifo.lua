-- First in, first out: whoever has room takes the request whose turn is the earliest.
local TAKES_BATCHES = false
local function consider(candidate, worker)
  return candidate.turn, 0
end
