-- Set aside a message that cannot be read. If a request stands behind it, the database knows, and it is published again.
-- ARGV: holder, tag, why. Returns 1, or 0 if it is not the holder's.
local holder, tag, why = unpack(ARGV, 2)
if redis.call('HGET', HOLDERS, tag) ~= holder then
  return 0
end
go_on_without_memory()
refuse(why, tag .. '\n' .. (redis.call('HGET', MESSAGES, tag) or ''))
forget(tag)
return 1
