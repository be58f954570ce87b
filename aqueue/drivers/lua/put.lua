-- Store results. Needs record.lua before it.
--
-- KEYS  the records' keys
-- ARGV  value, ttl (ms or '') for each key

for i, key in ipairs(KEYS) do
  put_record(key, ARGV[2 * i - 1], ARGV[2 * i])
end
return #KEYS
