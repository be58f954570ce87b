-- Bring back what is due: parked messages whose time has come, and messages whose holder let its lease end.
--
-- KEYS  1 aqueue:leases  2 aqueue:leased  3 aqueue:suspects  4 aqueue:lost  5 aqueue:parked  6 aqueue:parked:messages
--       7 aqueue:seq  8 a key that never exists
-- ARGV  1 how many of each at most  2 patience (ms)  3 how long losses are remembered (s)
--       4.. pauses (ms) before a message is ready again after its first, second... loss
-- Gives {now (ms), messages made ready, messages taken back, time of the next parked message (ms) or -1}.
--
-- A lease is taken back on second sight: at least `patience` after it was first seen ended, and not renewed since. So a
-- jump of the clock or a long pause of the server costs nothing when the holder lives. Safe to run by many at once.

local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local kept = 5  -- losses of a message

local function ready(id)
  local bytes = redis.call('HGET', KEYS[6], id)
  if bytes then
    local pushed = redis.pcall('LPUSH', string.match(id, '^%d+:(.*)$'), bytes)
    if type(pushed) == 'table' and pushed.err then
      redis.call('ZADD', KEYS[5], now + 60000, id)  -- its list holds something else; try again later
      return 0
    end
  end
  redis.call('ZREM', KEYS[5], id)
  redis.call('HDEL', KEYS[6], id)
  return 1
end

-- To its list at once, or among the parked; false when the list holds something else.
local function put_back(receipt, bytes, pause)
  local list = string.match(receipt, '^%d+:(.*)$')
  if pause > 0 then
    local id = string.format('%.0f:%s', redis.call('INCR', KEYS[7]), list)
    redis.call('HSET', KEYS[6], id, bytes)
    redis.call('ZADD', KEYS[5], now + pause, id)
    return true
  end
  local pushed = redis.pcall('RPUSH', list, bytes)
  return type(pushed) ~= 'table' or not pushed.err
end

local function take_back(receipt)
  local held = redis.call('HGET', KEYS[2], receipt)
  local holder, claimed, bytes = string.match(held or '', '^([^\n]*)\n(%d+)\n(.*)$')
  if bytes then
    local digest = redis.sha1hex(bytes)
    local known = redis.call('HGET', KEYS[4], digest) or '0\n\n'
    local count, deaths, losses = string.match(known, '^(%d+)\n([^\n]*)\n(.*)$')
    count = count + 1
    if not put_back(receipt, bytes, tonumber(ARGV[3 + math.min(count, #ARGV - 3)])) then
      return 0
    end
    local worker, cause = string.match(holder, '^([^\t]*)\t?(.*)$')
    if select(2, string.gsub(losses, '\n', '')) >= kept then
      losses = string.gsub(losses, '^[^\n]*\n', '', 1)
    end
    local loss = table.concat({receipt, worker, claimed, string.format('%.0f', now), cause}, '\t')
    redis.call('HSET', KEYS[4], digest, count .. '\n' .. deaths .. '\n' .. losses .. loss .. '\n')
    redis.call('EXPIRE', KEYS[4], ARGV[3])
  end
  redis.call('ZREM', KEYS[1], receipt)
  redis.call('HDEL', KEYS[2], receipt)
  redis.call('HDEL', KEYS[3], receipt)
  return 1
end

-- The mark of a suspect is '<end of lease> <first seen>'; another end means that it was renewed.
local function seen_long_ago(receipt, ends)
  local mark = redis.call('HGET', KEYS[3], receipt)
  local marked_end, since = string.match(mark or '', '^(%S+) (%S+)$')
  if marked_end ~= ends then
    redis.call('HSET', KEYS[3], receipt, ends .. ' ' .. string.format('%.0f', now))
    redis.call('EXPIRE', KEYS[3], ARGV[3])
    return false
  end
  return now - since >= tonumber(ARGV[2])
end

-- An idle worker runs this every few seconds: with nothing due it is as few commands as can be.
local next_one = redis.call('ZRANGE', KEYS[5], 0, 0, 'WITHSCORES')
local due = {}
if next_one[2] and tonumber(next_one[2]) <= now then
  due = redis.call('ZRANGEBYSCORE', KEYS[5], '-inf', now, 'LIMIT', 0, ARGV[1])
end
local ended = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', '(' .. now, 'WITHSCORES', 'LIMIT', 0, ARGV[1])
if #due + #ended > 0 then
  redis.call('DEL', KEYS[8])  -- deletes nothing: a full Redis allows it, and with it what follows
end

local made_ready, taken_back = 0, 0
for _, id in ipairs(due) do
  made_ready = made_ready + ready(id)
end
if #ended == 0 then
  redis.call('DEL', KEYS[3])  -- marks that are left are of leases that were renewed or settled
end
for i = #ended - 1, 1, -2 do  -- the newest first, so that the oldest is fetched first
  if seen_long_ago(ended[i], ended[i + 1]) then
    taken_back = taken_back + take_back(ended[i])
  end
end

if #due + #ended > 0 then
  next_one = redis.call('ZRANGE', KEYS[5], 0, 0, 'WITHSCORES')
end
return {now, made_ready, taken_back, next_one[2] and tonumber(next_one[2]) or -1}
