-- Renew leases. A lease that has ended but was not taken back yet is still its holder's.
--
-- KEYS  1 aqueue:leases  2 a key that never exists
-- ARGV  1 lease (ms), then receipts
-- Gives the receipts that are no longer leased.
--
-- The first write deletes nothing: a full Redis allows it, and with it the ZADD.

local clock = redis.call('TIME')
local ends = clock[1] * 1000 + math.floor(clock[2] / 1000) + ARGV[1]
redis.call('DEL', KEYS[2])
local gone = {}
for i = 2, #ARGV do
  if redis.call('ZSCORE', KEYS[1], ARGV[i]) then
    redis.call('ZADD', KEYS[1], 'XX', ends, ARGV[i])
  else
    gone[#gone + 1] = ARGV[i]
  end
end
return gone
