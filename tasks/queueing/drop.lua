-- Forget messages, wherever they are: their requests have ended. ARGV: tags. Returns how many there were.
local known = 0
go_on_without_memory()
for index = 2, #ARGV do
  known = known + redis.call('HEXISTS', MESSAGES, ARGV[index])
  forget(ARGV[index])
end
return known
