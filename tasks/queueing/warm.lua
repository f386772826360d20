-- Name a wanted profile that a worker shall compute now, and note that it does, so that no other does so too.
-- ARGV: what the worker would take, as JSON (see pull.py); how many tokens it has room to keep; profiles that it is spared, since
-- it tried them lately, and those of them that it has given up since it asked last, both as JSON arrays. Returns the profile, or
-- false if there is none.
--
-- Requests come first: nothing is named while some wait that this worker has no room for, and of what it may begin to compute
-- a profile takes its part as they do.
-- A copy counts if it is wholly on the GPU, or being computed, and its worker is alive. Wishes that end come first, since
-- somebody waits for them; of the others a bounded number is looked at, drawn by lot if there are more.
local AT_ONCE = 32
local WANTED, AWAITED = ARGV[1] .. 'wanted', ARGV[1] .. 'awaited'
local AT_LEAST_S, SLOWER = 5, 2
local wish_of, keeps = cjson.decode(ARGV[2]), tonumber(ARGV[3])
local worker, spared = wish_of.worker, {}
for _, profile in ipairs(cjson.decode(ARGV[4])) do
  spared[profile] = true
end
for _, profile in ipairs(cjson.decode(ARGV[5])) do
  if filling_end(redis.call('HGET', COPIES_OF .. profile, worker)) then
    redis.call('HDEL', COPIES_OF .. profile, worker)
  end
end
if not is_alive(worker) or wish_of.room < 1
  or redis.call('EXISTS', READY) == 1 and not redis.call('ZSCORE', IDLE, worker) then
  return false
end

-- Tells whether a worker may begin to compute so much now.
local function fits(tokens)
  return tokens <= keeps and (tokens <= wish_of.budget or wish_of.in_flight == 0)
end

-- Returns a wish, or nothing if somebody else wrote it, or it has ended.
local function read_wish(text)
  local is_json, wish = pcall(cjson.decode, text or '')
  if is_json and type(wish) == 'table' and type(wish.copies) == 'number' and type(wish.static_tokens) == 'number'
    and type(wish['until']) == 'number' and (wish['until'] == 0 or wish['until'] > now) then
    return wish
  end
end

-- Tells whether another copy is wanted, and this worker may make it.
local function is_missing(profile, wish)
  local copies = 0
  local found = redis.call('HGETALL', COPIES_OF .. profile)
  for index = 1, #found, 2 do
    local holder = found[index]
    local counts = state_of_copy(profile, holder, found[index + 1], wish.static_tokens)
    if counts and holder == worker then
      return false
    end
    copies = copies + (counts and is_alive(holder) and 1 or 0)
    if copies >= wish.copies then
      return false
    end
  end
  return true
end

local function take(profile, text)
  local wish = read_wish(text)
  if not wish then
    redis.call('HDEL', WANTED, profile)
    redis.call('ZREM', AWAITED, profile)
  elseif not spared[profile] and fits(wish.static_tokens) and is_missing(profile, wish) then
    -- Others are not kept from it for much longer than it should take.
    fill(worker, profile, wish.static_tokens,
      AT_LEAST_S + SLOWER * (wish_of.in_flight + wish.static_tokens) / wish_of.prefill_rate)
    return profile
  end
end

for _, profile in ipairs(redis.call('ZRANGE', AWAITED, 0, AT_ONCE - 1)) do
  if take(profile, redis.call('HGET', WANTED, profile)) then
    return profile
  end
end
local lasting = redis.call('HLEN', WANTED) <= AT_ONCE and redis.call('HGETALL', WANTED)
  or redis.call('HRANDFIELD', WANTED, AT_ONCE, 'WITHVALUES')
for index = 1, #lasting, 2 do
  if take(lasting[index], lasting[index + 1]) then
    return lasting[index]
  end
end
return false
