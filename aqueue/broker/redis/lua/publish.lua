-- Store messages, on their lists or among the parked ones.
--
-- KEYS  1 aqueue:seq  2 aqueue:parked  3 aqueue:parked:messages
-- ARGV  1 how many lists, then their names; for each message: the number of its list, delay (ms), bytes, the key,
--       value and ttl (ms or '') of the record that announces it ('' for none)
-- Gives {number of the message, error, ...} for those that could not be stored.
--
-- A message whose announcing record exists already was sent before, and is left out.

local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local lists = tonumber(ARGV[1])
local failures = {}

local function announced_before(key, value, ttl)
  if key == '' then
    return false
  elseif ttl == '' then
    return not redis.call('SET', key, value, 'NX')
  end
  return not redis.call('SET', key, value, 'NX', 'PX', ttl)
end

local function store(list, delay, bytes)
  if delay == '0' then
    return redis.pcall('LPUSH', list, bytes)
  end
  local id = string.format('%.0f:%s', redis.call('INCR', KEYS[1]), list)
  redis.call('HSET', KEYS[3], id, bytes)
  return redis.call('ZADD', KEYS[2], now + delay, id)
end

local number = 0
for i = lists + 2, #ARGV, 6 do
  number = number + 1
  local list, delay, bytes, key = ARGV[ARGV[i] + 1], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  if not announced_before(key, ARGV[i + 4], ARGV[i + 5]) then
    local stored = store(list, delay, bytes)
    if type(stored) == 'table' and stored.err then
      if key ~= '' then
        redis.call('DEL', key)
      end
      failures[#failures + 1] = number
      failures[#failures + 1] = list .. ': ' .. stored.err
    end
  end
end
return failures
