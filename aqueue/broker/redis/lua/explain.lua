-- Say why the holder of some claims is gone.
--
-- KEYS  1 aqueue:leased  2 aqueue:lost  3 a key that never exists
-- ARGV  1 the cause, without tabs and newlines, then for each claim: receipt, where its loss is: a field of
--       aqueue:lost, or '' when that is not known
-- Gives the receipts that were not found.
--
-- A claim that is still leased carries its cause behind its holder's name, until it is taken back. The receipt begins
-- the line of its loss (see tend.lua).

redis.call('DEL', KEYS[3])  -- deletes nothing: a full Redis allows it, and with it what follows
local missing = {}

local function explain_held(receipt)
  local held = redis.call('HGET', KEYS[1], receipt)
  local holder, rest = string.match(held or '', '^([^\t\n]*)[^\n]*(\n.*)$')
  if holder then
    redis.call('HSET', KEYS[1], receipt, holder .. '\t' .. ARGV[1] .. rest)
  end
  return holder
end

local function explain_lost(receipt, digest)
  local known = redis.call('HGET', KEYS[2], digest) or ''
  local from = string.find(known, '\n' .. receipt .. '\t', 1, true)
  local to = from and string.find(known, '\n', from + 1, true)
  if to then
    local loss = string.match(string.sub(known, from + 1, to - 1), '^([^\t]*\t[^\t]*\t%d+\t%d+\t)')
    redis.call('HSET', KEYS[2], digest, string.sub(known, 1, from) .. loss .. ARGV[1] .. string.sub(known, to))
  end
  return to
end

for i = 2, #ARGV, 2 do
  if not explain_held(ARGV[i]) and (ARGV[i + 1] == '' or not explain_lost(ARGV[i], ARGV[i + 1])) then
    missing[#missing + 1] = ARGV[i]
  end
end
return missing
