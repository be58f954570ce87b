-- Carry out verdicts on leased messages. Needs record.lua before it.
--
-- KEYS  1 aqueue:leases  2 aqueue:leased  3 aqueue:lost  4 aqueue:seq  5 aqueue:parked  6 aqueue:parked:messages
--       7 aqueue:dead  8 aqueue:dead:messages  9 aqueue:dead:letters  10 a key that never exists
-- ARGV  1 how many verdicts, then for each: receipt, kind, argument, the key, value and ttl (ms or '') of a record ('' for
--       none), the number of messages to publish, and for each of those: list, delay (ms), bytes
--       kind 'ack': argument ''  -  'release': delay in ms, 0 for the front, -1 for the end  -  'bury': the dead letter
-- Gives {receipt, '' or error, ...} for the verdicts that were refused: '' when the lease was no longer held.
--
-- The first write deletes nothing: a full Redis allows it, and with it all that follows, so that work can end and free
-- memory. The lease goes last: whatever fails on the way leaves the message leased, to come back, never lost.

local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
redis.call('DEL', KEYS[10])
local any_lost = redis.call('EXISTS', KEYS[3]) == 1
local refused, settled, cleared = {}, {}, {}

local function bytes_of(receipt)
  local held = redis.call('HGET', KEYS[2], receipt)
  return held and string.match(held, '^[^\n]*\n%d+\n(.*)$')
end

local function park(list, delay, bytes)
  local id = string.format('%.0f:%s', redis.call('INCR', KEYS[4]), list)
  redis.call('HSET', KEYS[6], id, bytes)
  redis.call('ZADD', KEYS[5], now + delay, id)
end

local function release(receipt, argument)
  local list, bytes = string.match(receipt, '^%d+:(.*)$'), bytes_of(receipt)
  if argument == '0' then
    redis.call('RPUSH', list, bytes)
  elseif argument == '-1' then
    redis.call('LPUSH', list, bytes)
  else
    park(list, argument, bytes)
  end
end

local function bury(receipt, letter)
  local id = string.match(receipt, '^%d+')
  redis.call('HSET', KEYS[8], id, bytes_of(receipt))
  redis.call('HSET', KEYS[9], id, letter)
  redis.call('ZADD', KEYS[7], now, id)
end

local function publish(first, count)
  for i = first, first + 3 * count - 1, 3 do
    if ARGV[i + 1] == '0' then
      redis.call('LPUSH', ARGV[i], ARGV[i + 2])
    else
      park(ARGV[i], ARGV[i + 1], ARGV[i + 2])
    end
  end
end

local function settle(i)
  local receipt, kind, argument, key = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  if key ~= '' then
    put_record(key, ARGV[i + 4], ARGV[i + 5])
  end
  publish(i + 7, tonumber(ARGV[i + 6]))
  if kind == 'release' then
    release(receipt, argument)
  else
    if kind == 'bury' then
      bury(receipt, argument)
    end
    local bytes = any_lost and bytes_of(receipt)
    if bytes then
      cleared[#cleared + 1] = redis.sha1hex(bytes)
    end
  end
end

local at = 2
for _ = 1, ARGV[1] do
  local receipt = ARGV[at]
  if not redis.call('ZSCORE', KEYS[1], receipt) then
    refused[#refused + 1] = receipt
    refused[#refused + 1] = ''
  else
    local ok, failure = pcall(settle, at)
    if ok then
      settled[#settled + 1] = receipt
    else
      refused[#refused + 1] = receipt
      refused[#refused + 1] = type(failure) == 'table' and failure.err or tostring(failure)
    end
  end
  at = at + 7 + 3 * ARGV[at + 6]
end

if #cleared > 0 then
  redis.call('HDEL', KEYS[3], unpack(cleared))
end
if #settled > 0 then
  redis.call('ZREM', KEYS[1], unpack(settled))
  redis.call('HDEL', KEYS[2], unpack(settled))
end
return refused
