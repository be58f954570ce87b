-- Keep tasks as revoked, and tell whoever listens.
--
-- KEYS  1 a key that never exists  2 aqueue:seq  3 aqueue:revoked  4 aqueue:revoked:why  5 aqueue:revoked:version
-- ARGV  1 ttl (ms)  2 why, as JSON  3 how many are kept at most  4 a channel  5 how many messages, then these;
--       then the tasks' ids
-- Gives how many were forgotten before their time, for want of room.
--
-- The first write deletes nothing: a full Redis allows it, and with it all that follows.

local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
redis.call('DEL', KEYS[1])

local function forget(ids)
  for _, id in ipairs(ids) do
    redis.call('ZREM', KEYS[3], id)
    redis.call('HDEL', KEYS[4], id)
  end
  return #ids
end

forget(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now, 'LIMIT', 0, 1000))
local messages = tonumber(ARGV[5])
for i = 6 + messages, #ARGV do
  redis.call('ZADD', KEYS[3], now + ARGV[1], ARGV[i])
  redis.call('HSET', KEYS[4], ARGV[i], ARGV[2])
end
local excess = redis.call('ZCARD', KEYS[3]) - ARGV[3]
local forgotten = excess > 0 and forget(redis.call('ZRANGE', KEYS[3], 0, excess - 1)) or 0
redis.call('SET', KEYS[5], redis.call('INCR', KEYS[2]))
local last = redis.call('ZRANGE', KEYS[3], -1, -1, 'WITHSCORES')
for i = 3, 5 do
  redis.call('PEXPIREAT', KEYS[i], string.format('%.0f', last[2]))
end
for i = 6, 5 + messages do
  redis.call('PUBLISH', ARGV[4], ARGV[i])
end
return forgotten
