-- Result records, shared by settle.lua and put.lua. The caller's `redis.call` order makes it the first write
-- only where memory is known to allow it.

-- Whether a stored result says SUCCESS. `status` is the first key of every result document; the
-- patterns are its JSON and its msgpack forms, with up to 15 keys and with more.
local function is_success(head)
  return string.find(head, '^{"status": ?"SUCCESS"')
    or string.find(head, '^[\128-\143]\166status\167SUCCESS')
    or string.find(head, '^\222..\166status\167SUCCESS')
end

-- Store a record and tell those who wait for it; a SUCCESS is never overwritten. `ttl` in ms, '' for none.
local function put_record(key, value, ttl)
  if is_success(redis.call('GETRANGE', key, 0, 31)) then
    return
  end
  if ttl == '' then
    redis.call('SET', key, value)
  else
    redis.call('SET', key, value, 'PX', ttl)
  end
  redis.call('PUBLISH', key, value)
end
