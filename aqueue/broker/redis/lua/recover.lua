-- Give back what is held or parked, whoever held it.
--
-- KEYS  1 aqueue:leases or aqueue:parked  2 aqueue:leased or aqueue:parked:messages
-- ARGV  1 'leases' or 'parked', then receipts or ids
-- Gives how many were given back. Of leases only those that have ended are taken.

local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local given = 0
for i = 2, #ARGV do
  local id = ARGV[i]
  local score = redis.call('ZSCORE', KEYS[1], id)
  local held = score and redis.call('HGET', KEYS[2], id)
  if held and ARGV[1] == 'leases' then
    held = tonumber(score) < now and string.match(held, '^[^\n]*\n%d+\n(.*)$')
  end
  if held then
    redis.call(ARGV[1] == 'leases' and 'RPUSH' or 'LPUSH', string.match(id, '^%d+:(.*)$'), held)
    redis.call('ZREM', KEYS[1], id)
    redis.call('HDEL', KEYS[2], id)
    given = given + 1
  end
end
return given
