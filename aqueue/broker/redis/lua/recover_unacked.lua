-- Give back one message that a Celery worker fetched and left in kombu's `unacked`.
--
-- KEYS  1 unacked  2 unacked_index  3 the list to give it back to
-- ARGV  1 delivery tag  2 the entry as it was read  3 the envelope
-- Gives 1, or 0 when the entry has changed or gone meanwhile.

if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then
  return 0
end
redis.call('RPUSH', KEYS[3], ARGV[3])
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
return 1
