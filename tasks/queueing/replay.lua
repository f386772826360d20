-- Say what the strategy would make of a decision that was made before. ARGV: the decision, as JSON (see reserve.lua).
-- Returns JSON: the candidates' prices and when each would be eligible, and the index of the one chosen, from 0, or -1.
local decision = cjson.decode(ARGV[2])
local answer, cheapest = {prices = {}, eligible_at = {}, chosen = -1}, math.huge
decision.worker_facts.at = decision.at
for index, candidate in ipairs(decision.candidates) do
  for name, value in pairs(candidate) do
    candidate[name] = value ~= cjson.null and value or nil
  end
  local price, eligible_at = consider(candidate, decision.worker_facts)
  answer.prices[index], answer.eligible_at[index] = price, eligible_at
  if eligible_at <= decision.at and price < cheapest then
    answer.chosen, cheapest = index - 1, price
  end
end
return cjson.encode(answer)
