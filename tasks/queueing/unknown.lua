-- Tell which messages Redis does not have: they neither wait, nor are delayed, nor leased. ARGV: tags. Returns those.
-- A Redis that takes no writes is not asked: it may be a replica that has heard of them only in part.
need_writes()
local missing = {}
for index = 2, #ARGV do
  if redis.call('HEXISTS', MESSAGES, ARGV[index]) == 0 then
    missing[#missing + 1] = ARGV[index]
  end
end
return missing
