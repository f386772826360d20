-- Append a message to its list, and wake a worker. Putting it again, or while a worker has it, changes nothing.
-- ARGV: list, tag, organization, tokens, head start in seconds, message, tokens of the static part, its chain.
-- Returns 1, or 0 if it was there.
-- Its turn is Redis's time, whatever the gateways' clocks say, less the head start of its priority. All of a list have the
-- same priority, so a list is in the order of turns.
local list, tag, organization, tokens, head_start, message, static, chain = unpack(ARGV, 2)
if redis.call('HEXISTS', MESSAGES, tag) == 1 then
  return 0
end
local turn = stamp(now - head_start)
local header = {
  turn = turn, list = list, organization = organization, tokens = tonumber(tokens), static = tonumber(static or 0),
  chain = chain or '', head_start = tonumber(head_start),
}
-- First what might fail, where somebody has made something else of the list: a script's steps are not taken back.
redis.call('LPUSH', LISTS .. list, turn .. ' ' .. tag)
redis.call('HSET', MESSAGES, tag,
  cjson.encode({turn, list, organization, header.tokens, header.static, header.chain, header.head_start}) .. '\n' .. message)
add_to_sum(list, turn, header.head_start, 1)
make_ready(header, turn, 'NX')
count_waiting(header, 1)
wake_for(list)
return 1
