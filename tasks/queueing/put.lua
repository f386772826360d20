-- Append a message to its list, and wake one worker.
-- KEYS: list, ready, wake, waiting.
-- ARGV: name of the list, delivery tag, message, head start in seconds, how many messages may wait (0: any number).
-- Returns 1, or 0 if too many wait, and nothing was done.
-- An element of a list is "<turn> <tag> <message>": its turn is Redis's time, whatever the gateways' clocks say, less
-- the head start of its priority. All of a list have the same priority, so a list is in the order of turns.
local waiting = tonumber(redis.call('GET', KEYS[4]) or 0)
if tonumber(ARGV[5]) > 0 and waiting >= tonumber(ARGV[5]) then
  return 0
end
local time = redis.call('TIME')
local turn = string.format('%d.%06d', time[1] - ARGV[4], time[2])
redis.call('LPUSH', KEYS[1], turn .. ' ' .. ARGV[2] .. ' ' .. ARGV[3])
redis.call('ZADD', KEYS[2], 'NX', turn, ARGV[1])
if redis.call('LLEN', KEYS[3]) == 0 then
  redis.call('LPUSH', KEYS[3], 1)
end
redis.call('INCR', KEYS[4])
return 1
