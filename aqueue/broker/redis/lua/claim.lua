-- Claim messages: take them off their lists and lease them, in one step.
--
-- KEYS  1 aqueue:seq  2 aqueue:leases  3 aqueue:leased  4 aqueue:lost  5.. lists, the most urgent first
-- ARGV  1 how many  2 lease (ms)  3 holder
-- Gives {now (ms), error or '', receipt, losses, bytes, receipt, losses, bytes, ...}; losses: '0', or a field of
-- aqueue:lost
--
-- The first write is RPOP, which a full Redis allows; what follows in the same script is then allowed too.
-- Looking at every list, at the start and when fewer were found than asked for, has the server tell a connection
-- with tracking on as soon as one of them changes.

local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local wanted = tonumber(ARGV[1])
local reply = {now, ''}
if redis.call('EXISTS', unpack(KEYS, 5)) == 0 then
  return reply
end
local lease, leased = {}, {}

local function digest_losses(bytes)
  return redis.call('HGET', KEYS[4], redis.sha1hex(bytes)) or '0'
end

local any_lost = redis.call('EXISTS', KEYS[4]) == 1
local found = 0
for list = 5, #KEYS do
  if found < wanted then
    local popped = redis.pcall('RPOP', KEYS[list], wanted - found)
    if popped and popped.err then
      reply[2] = KEYS[list] .. ': ' .. popped.err
    elseif popped then
      local seq = redis.call('INCRBY', KEYS[1], #popped) - #popped
      for i, bytes in ipairs(popped) do
        local receipt = string.format('%.0f:%s', seq + i, KEYS[list])
        lease[#lease + 1] = now + ARGV[2]
        lease[#lease + 1] = receipt
        leased[#leased + 1] = receipt
        leased[#leased + 1] = ARGV[3] .. '\n' .. now .. '\n' .. bytes
        reply[#reply + 1] = receipt
        reply[#reply + 1] = any_lost and digest_losses(bytes) or '0'
        reply[#reply + 1] = bytes
      end
      found = found + #popped
    end
  end
end

if found > 0 then
  -- These two can only fail when the keys hold something else; then everything goes back.
  local stored = redis.pcall('HSET', KEYS[3], unpack(leased))
  local timed = redis.pcall('ZADD', KEYS[2], unpack(lease))
  local failed = (type(stored) == 'table' and stored.err) or (type(timed) == 'table' and timed.err)
  if failed then
    for i = #reply, 5, -3 do
      redis.call('RPUSH', string.match(reply[i - 2], '^%d+:(.*)$'), reply[i])
    end
    return redis.error_reply(failed)
  end
end
if found < wanted then
  redis.call('EXISTS', unpack(KEYS, 5))
end
return reply
