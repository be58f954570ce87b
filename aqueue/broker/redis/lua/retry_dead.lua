-- Put dead letters back at the end of their lists.
--
-- KEYS  1 aqueue:dead  2 aqueue:dead:messages  3 aqueue:dead:letters  4 aqueue:lost
-- ARGV  1 how long losses and deaths are remembered (s), then for each letter: id, list, its deaths as JSON
-- Gives how many were put back.

local moved = 0
for i = 2, #ARGV, 3 do
  local bytes = redis.call('HGET', KEYS[2], ARGV[i])
  if bytes then
    redis.call('LPUSH', ARGV[i + 1], bytes)
    redis.call('HSET', KEYS[4], redis.sha1hex(bytes), '0\n' .. ARGV[i + 2] .. '\n')
    redis.call('EXPIRE', KEYS[4], ARGV[1])
    redis.call('ZREM', KEYS[1], ARGV[i])
    redis.call('HDEL', KEYS[2], ARGV[i])
    redis.call('HDEL', KEYS[3], ARGV[i])
    moved = moved + 1
  end
end
return moved
