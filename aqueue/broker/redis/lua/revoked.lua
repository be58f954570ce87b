-- What is kept as revoked, if that has changed.
--
-- KEYS  1 aqueue:revoked  2 aqueue:revoked:why  3 aqueue:revoked:version
-- ARGV  1 the version that is known already, '' for none
-- Gives {the clock (ms), version}, and when it is another also {id, end (ms), ...}, {id, why, ...}; the ended ones
-- included.

local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local version = redis.call('GET', KEYS[3]) or ''
if version == ARGV[1] then
  return {now, version}
end
return {now, version, redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES'), redis.call('HGETALL', KEYS[2])}
