-- Note what a worker's cache holds. ARGV: the report, as JSON (see pull.py). Returns 1, or 0 if Redis knows nothing of this
-- epoch, or missed a report of it: then the worker shall send all that it holds.
local DEAD_AT_ONCE = 2
local report = cjson.decode(ARGV[2])
local worker, cache = report.worker, report.cache
local known = redis.call('HGET', WORKERS, worker)
local last = known and cjson.decode(known)
go_on_without_memory()
redis.call('ZADD', ALIVE, stamp(now), worker)
forget_silent(DEAD_AT_ONCE)
if not report.full and not (last and last.epoch == report.epoch and last.number == report.number - 1) then
  return 0
end
if report.full then
  forget_cache(worker)
end
for link, held in pairs(cache) do
  hold(worker, link, held[1], held[2], held[3])
end
-- What it has in hand becomes less without its asking for more.
if report.facts.load then
  redis.call('ZADD', IDLE, 'XX', report.facts.load, worker)
end
redis.call('HSET', WORKERS, worker,
  cjson.encode({epoch = report.epoch, number = report.number, at = now, facts = report.facts}))
for organization, tokens in pairs(report.served) do
  redis.call('ZADD', SERVED, 'XX', 'INCR', tokens, organization)
end
return 1
